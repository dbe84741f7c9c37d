"""``python -m ijepa_fast.embed``: see `evaluate/embedding.py`."""

import sys

from ijepa_fast.evaluate.embedding import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
