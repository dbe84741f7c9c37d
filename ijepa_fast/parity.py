"""``python -m ijepa_fast.parity``: see `verify/parity.py`."""

from ijepa_fast.__main__ import enter
from ijepa_fast.verify.parity import main

__all__ = ["main"]

if __name__ == "__main__":
    enter("parity")
