"""``python -m ijepa_fast.embed``: see `evaluate/embedding.py`."""

from ijepa_fast.__main__ import enter
from ijepa_fast.evaluate.embedding import main

__all__ = ["main"]

if __name__ == "__main__":
    enter("embed")
