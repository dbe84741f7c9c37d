"""Pictures of a run, as PNG, and its report: ``python -m ijepa_fast.visualize``. PNG files need the
extra `viz`.
"""

from ijepa_fast.visualize.run_pictures import Pictures

__all__ = ["Pictures"]
