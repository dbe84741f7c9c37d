"""Pictures of a run, as PNG: ``python -m ijepa_fast.visualize``. Needs the extra `viz`."""

from ijepa_fast.visualize.curves import draw_curves
from ijepa_fast.visualize.masks import draw_masks
from ijepa_fast.visualize.run_pictures import Pictures

__all__ = [
    "Pictures",
    "draw_curves",
    "draw_masks",
]
