"""``python -m ijepa_fast.parity``: see `verify/parity.py`."""

import sys

from ijepa_fast.verify.parity import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
