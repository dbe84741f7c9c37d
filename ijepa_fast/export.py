"""``python -m ijepa_fast.export``: see `weights/export.py`."""

from ijepa_fast.__main__ import enter
from ijepa_fast.weights.export import main

__all__ = ["main"]

if __name__ == "__main__":
    enter("export")
