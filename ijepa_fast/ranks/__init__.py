"""How the processes of a run meet, agree, share the table of the data, and stop."""

from ijepa_fast.ranks.dataset import load_index
from ijepa_fast.ranks.distributed import (
    BUCKET_ELEMENTS,
    all_reduce_max_,
    all_reduce_sum_,
    slow_bfloat16,
)
from ijepa_fast.ranks.faults import Faults
from ijepa_fast.ranks.signals import Signals

__all__ = [
    "BUCKET_ELEMENTS",
    "Faults",
    "Signals",
    "all_reduce_max_",
    "all_reduce_sum_",
    "load_index",
    "slow_bfloat16",
]
