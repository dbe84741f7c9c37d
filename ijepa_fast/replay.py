"""``python -m ijepa_fast.replay``: see `verify/replay.py`."""

from ijepa_fast.__main__ import enter
from ijepa_fast.verify.replay import main

__all__ = ["main"]

if __name__ == "__main__":
    enter("replay")
