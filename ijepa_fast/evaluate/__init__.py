"""What features are worth: kNN, linear probes and fine-tuning, beside raw pixels and the untrained
network.

``python -m ijepa_fast.evaluate RUN_OR_WEIGHTS --data DIR`` works on anything that
`ijepa_fast.weights` reads, and any labelled folder. Features are the target encoder's (paper,
section 4), averaged over patches; images are cropped centrally.
"""

from ijepa_fast.evaluate.command import main, untrained
from ijepa_fast.evaluate.features import encoder_features, pixels
from ijepa_fast.evaluate.labelled import (
    BATCH,
    Images,
    Split,
    central_windows,
    labelled_data,
    parts_of,
)
from ijepa_fast.evaluate.monitors import collapse_warning
from ijepa_fast.evaluate.online import UNTRAINED, OnlineEvaluation, look_interval
from ijepa_fast.evaluate.scores import knn_scores, knn_table

__all__ = [
    "BATCH",
    "UNTRAINED",
    "Images",
    "OnlineEvaluation",
    "Split",
    "central_windows",
    "collapse_warning",
    "encoder_features",
    "knn_scores",
    "knn_table",
    "labelled_data",
    "look_interval",
    "main",
    "parts_of",
    "pixels",
    "untrained",
]
