"""``python -m ijepa_fast.evaluate``."""

from ijepa_fast.__main__ import enter
from ijepa_fast.evaluate.command import main

__all__ = ["main"]

if __name__ == "__main__":
    enter("evaluate")
