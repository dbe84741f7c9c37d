"""What a configuration costs, by arithmetic: FLOPs and memory, the device batch that fits, and the
text of `--dry-run`.
"""

from ijepa_fast.estimate.costs import Costs, Rows
from ijepa_fast.estimate.report import hours, in_words, measured_flops, report
from ijepa_fast.estimate.total import Estimate, device_batch, device_memory, estimate

__all__ = [
    "Costs",
    "Estimate",
    "Rows",
    "device_batch",
    "device_memory",
    "estimate",
    "hours",
    "in_words",
    "measured_flops",
    "report",
]
