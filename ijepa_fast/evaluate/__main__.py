"""``python -m ijepa_fast.evaluate``."""

import sys

from ijepa_fast.evaluate.command import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
