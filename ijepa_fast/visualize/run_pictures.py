"""The pictures that a run draws of itself: `masks.png` and `curves.png`."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ijepa_fast.data import Batch
from ijepa_fast.masks import Masks
from ijepa_fast.state import Allowance

__all__ = ["Pictures"]

_logger = logging.getLogger(__name__)

# between two drawings of the curves while a run trains
_MINUTES = 5.0


class Pictures:
    """Draws into a run's folder.

    Args:
        folder: the run's, None on the ranks that write nothing.
        allowance: where the time comes from.
    """

    def __init__(self, folder: Path | None, allowance: Allowance) -> None:
        self.folder, self.allowance = folder, allowance
        self._drawn = time.monotonic()

    def masks(self, batch: Batch, masks: Masks, grid: tuple[int, int]) -> None:
        """The masks of a batch's first images over them."""
        images = batch.images[:4].cpu().numpy()
        with self.allowance.spend("picture"):
            self._draw("masks.png", lambda v, path: v.draw_masks(path, images, masks, grid))

    def curves(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The metrics so far."""
        # a copy: more rows come while a thread draws
        runs = {self.folder.name if self.folder else "": list(rows)}
        self._draw("curves.png", lambda v, path: v.draw_curves(path, runs))

    def curves_at_times(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same every few minutes, if there is time for it."""
        if time.monotonic() - self._drawn >= 60 * _MINUTES and self.allowance.covers("picture"):
            with self.allowance.spend("picture"):
                self.curves(rows)
            self._drawn = time.monotonic()

    def _draw(self, name: str, draw: Callable[[ModuleType, Path], None]) -> None:
        if not self.folder:
            return
        try:
            from ijepa_fast import visualize

            draw(visualize, self.folder / name)
        except ModuleNotFoundError as error:
            _logger.warning("%s is not drawn: %s (pip install 'ijepa-fast[viz]')", name, error)
        except (OSError, ValueError) as error:
            # a picture is no reason to lose a run
            _logger.warning("%s is not drawn: %s", name, error)
