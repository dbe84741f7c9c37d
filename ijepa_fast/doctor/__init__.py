"""`python -m ijepa_fast.doctor`: what a machine has, which back ends run on it, and what is wrong.

Modules are imported where they are used: the doctor also has to run where torch or tyro is missing.
"""

__all__: list[str] = []
