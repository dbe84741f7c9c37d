"""Errors that end a command, each with its exit code."""

from pathlib import PurePath

__all__ = [
    "CheckpointError",
    "MainRankError",
    "NonFiniteError",
    "NonFiniteState",
    "TooManyBadFiles",
    "UsageError",
    "exit_code",
    "require",
]


class UsageError(ValueError):
    """Wrong input of the user, said in one line.

    Example:
        >>> ijepa_fast.load_encoder("nowhere")
        Traceback (most recent call last):
        ijepa_fast.errors.UsageError: weights must be a run's folder, a checkpoint, ...
        >>> issubclass(ijepa_fast.UsageError, ValueError)
        True
    """

    exit_code = 2


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or none of those present can be used."""

    exit_code = 3


class TooManyBadFiles(RuntimeError):
    """More files are unusable than `data.max_bad_share` allows, or a shard or a folder is lost."""

    exit_code = 4


class NonFiniteState(RuntimeError):
    """A state holds NaN or infinity, and is not written."""

    exit_code = 4


class NonFiniteError(RuntimeError):
    """Loss or gradients stay non-finite.

    Args:
        steps: the steps in a row that were skipped, counted from 1.
        where: more for whoever reads it: where to look.
    """

    exit_code = 4

    def __init__(self, steps: range, where: str = "Lower optim.lr or look at the data") -> None:
        super().__init__(
            f"loss and gradients must be finite, got {len(steps)} steps in a row with NaN or "
            f"infinity (steps {steps[0]} to {steps[-1]}); they changed no weights. {where}"
        )
        self.steps = steps


class MainRankError(RuntimeError):
    """Rank 0 has failed and says why; the others only leave."""

    exit_code = 1


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Refuses wrong input in the words of all commands: what must be how, and what was given.

    Raises:
        UsageError: it does not hold.
    """
    if not holds:
        value = str(value) if isinstance(value, PurePath) else value
        raise UsageError(f"{name} must be {rule}, got {value!r}")


def exit_code(error: Exception) -> int:
    """Exit code of a command that an error ends: the error's own, 2 (wrong input) for others."""
    code: int = getattr(error, "exit_code", 2)
    return code
