"""ijepa-fast: faithful and fast I-JEPA pretraining."""

__version__ = "0.1.0"
