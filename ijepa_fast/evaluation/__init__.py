"""What features are worth: kNN, linear probes and fine-tuning, beside raw pixels and the untrained
network.

``ijepa-fast evaluate RUN_OR_WEIGHTS --data DIR`` works on anything that
`ijepa_fast.weights` reads, and any labelled folder; ``ijepa-fast embed`` writes the
features of any folder into a file. Features are the target encoder's (paper,
section 4), averaged over patches; images are cropped centrally.
"""

from ijepa_fast.evaluation.command import evaluate, main
from ijepa_fast.evaluation.embedding import Embedded, embed
from ijepa_fast.evaluation.features import encoder_of, untrained
from ijepa_fast.evaluation.finetune import FinetuneSettings
from ijepa_fast.evaluation.labelled import (
    BATCH,
    Images,
    Split,
    labelled_data,
    parts_of,
    shown_part,
)
from ijepa_fast.evaluation.scheduled import ScheduledEvaluation
from ijepa_fast.evaluation.scores import final_table, knn_scores, table

__all__ = [
    "BATCH",
    "Embedded",
    "FinetuneSettings",
    "Images",
    "ScheduledEvaluation",
    "Split",
    "embed",
    "encoder_of",
    "evaluate",
    "final_table",
    "knn_scores",
    "labelled_data",
    "main",
    "parts_of",
    "shown_part",
    "table",
    "untrained",
]
