"""Whether the step is the published one, and why one went wrong: parity, recordings, replay."""

from ijepa_fast.verify.nonfinite import name_samples

__all__ = ["name_samples"]
