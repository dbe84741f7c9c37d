"""The embedded and the named data sets."""

__all__: list[str] = []
