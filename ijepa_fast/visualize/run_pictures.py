"""The pictures that a run draws of itself, and its report."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ijepa_fast.config import load_yaml
from ijepa_fast.data import Batch
from ijepa_fast.masks import Masks
from ijepa_fast.state import Allowance, checkpoint_folders
from ijepa_fast.visualize import feature_pictures
from ijepa_fast.visualize.curves import draw_curves
from ijepa_fast.visualize.inputs import open_weights, source_of
from ijepa_fast.visualize.masks import draw_masks
from ijepa_fast.visualize.report import next_commands, write_report

__all__ = ["Pictures"]

_logger = logging.getLogger(__name__)

# between two drawings of the curves while a run trains
_MINUTES = 5.0
# images among which neighbours are looked for
_POOL = 1000
# bytes a second of a checkpoint that is read back; the least that two pictures of features take
_READ, _SECONDS = 2**29, 5.0


class Pictures:
    """Draws into a run's folder.

    Args:
        folder: the run's, None on the ranks that write nothing.
        allowance: where the time comes from.
        images: how many the run has.
        whole: draw all of them at the end, whatever that takes (`eval.whole`).
    """

    def __init__(
        self, folder: Path | None, allowance: Allowance, images: int, *, whole: bool = False
    ) -> None:
        self.folder, self.allowance, self.whole = folder, allowance, whole
        self._pool = min(images, _POOL)
        self._drawn = time.monotonic()

    def masks(self, batch: Batch, masks: Masks, grid: tuple[int, int]) -> None:
        """The masks of a batch's first images over them."""
        images = batch.images[:4].cpu().numpy()
        with self.allowance.spend("picture"):
            self._draw("masks.png", lambda path: draw_masks(path, images, masks, grid))

    def curves(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The metrics so far."""
        # a copy: more rows come while a thread draws
        runs = {self.folder.name if self.folder else "": list(rows)}
        self._draw("curves.png", lambda path: draw_curves(path, runs))

    def curves_at_times(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same every few minutes, if there is time for it."""
        if time.monotonic() - self._drawn >= 60 * _MINUTES and self.allowance.covers("picture"):
            with self.allowance.spend("picture"):
                self.curves(rows)
            self._drawn = time.monotonic()

    def at_end(self, rows: Sequence[Mapping[str, Any]], status: str, *, done: bool) -> None:
        """The curves, of a run that is done what its encoder sees, and the report.

        Args:
            rows: of `metrics.jsonl`.
            status: how the run ended, in words.
            done: whether it came to its end.
        """
        if not self.folder:
            return
        with self.allowance.spend("pictures and report"):
            self.curves(rows)
            if done and rows and self._time_for_features(rows):
                self._draw("pca.png and neighbours.png", lambda path: self._features(path.parent))
            self._draw("report.html", lambda path: write_report(path, path.parent, status))
        if done:
            settings = load_yaml((self.folder / "config.yaml").read_text(encoding="utf-8"))
            _logger.info("on one page: %s", self.folder / "report.html")
            _logger.info("what to type next:")
            for command in next_commands(self.folder, settings):
                _logger.info("  %s", command)

    def _time_for_features(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether pictures of features fit into the share of the time, by an estimate."""
        assert self.folder
        if self.whole:
            return True
        rates = [row["timing"].get("images_per_second") for row in rows if "loss" in row]
        seconds = max(_SECONDS, 4 * self.allowance.last.get("picture", 0.0))
        seconds += self._pool / max(1e-3, rates[-1] or 0.0) if rates else 0.0
        for folder in checkpoint_folders(self.folder / "checkpoints")[:1]:
            seconds += (folder / "state.safetensors").stat().st_size / _READ
        left = self.allowance.share * self.allowance.elapsed - self.allowance.spent
        if seconds > left:
            _logger.info(
                "no pca.png, no neighbours.png: %.0f s are over %g %% of the run "
                "(ijepa-fast visualize draws them)",
                *(seconds, 100 * self.allowance.share),
            )
        return seconds <= left

    def _features(self, folder: Path) -> None:
        opened = open_weights(folder)
        root = source_of(None, opened.config)
        self._draw("pca.png", lambda path: feature_pictures.pca(path, opened, root))
        self._draw(
            "neighbours.png",
            lambda path: feature_pictures.neighbours(path, opened, root, pool=_POOL),
        )

    def _draw(self, name: str, draw: Callable[[Path], Any]) -> None:
        if not self.folder:
            return
        try:
            draw(self.folder / name)
        except ModuleNotFoundError as error:
            _logger.warning("%s is not drawn: %s (pip install 'ijepa-fast[viz]')", name, error)
        except Exception as error:  # noqa: BLE001  # a picture is no reason to lose a run
            reason = " ".join(str(error).split()) or type(error).__name__
            _logger.warning("%s is not drawn: %s", name, reason)
