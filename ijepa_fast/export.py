"""``python -m ijepa_fast.export``: see `weights/export.py`."""

import sys

from ijepa_fast.weights.export import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
