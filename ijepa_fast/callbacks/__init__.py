"""Who is told what a run does: the metrics file, the progress bar, loggers, the user's own."""

from ijepa_fast.callbacks.callback import Callback, RunInfo, Status
from ijepa_fast.callbacks.dispatch import Callbacks
from ijepa_fast.callbacks.loggers import check_packages, loggers
from ijepa_fast.callbacks.metrics_file import MetricsFile, read_rows
from ijepa_fast.callbacks.progress import Progress

__all__ = [
    "Callback",
    "Callbacks",
    "MetricsFile",
    "Progress",
    "RunInfo",
    "Status",
    "check_packages",
    "loggers",
    "read_rows",
]
