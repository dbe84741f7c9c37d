"""Pictures of a run; `python -m ijepa_fast.visualize --help`. Needs the extra `viz`."""

from ijepa_fast.visualize.curves import draw_curves
<<<<<<< HEAD
=======
from ijepa_fast.visualize.figure import pyplot
>>>>>>> pictures
from ijepa_fast.visualize.masks import draw_masks

__all__ = ["draw_curves", "draw_masks"]

# the name that tests of the first version use
_pyplot = pyplot
