"""``python -m ijepa_fast.replay``: see `verify/replay.py`."""

import sys

from ijepa_fast.verify.replay import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
