"""Updates of many tensors in one launch, and the optimiser and the average that keep their tables.

Outside: `adamw_ema_`, `ema_update_` and the classes.
"""

from ijepa_kernels.optim.adamw_ema import adamw_ema_
from ijepa_kernels.optim.average import EMA
from ijepa_kernels.optim.ema_update import ema_update_
from ijepa_kernels.optim.optimizer import AdamWEMA

__all__ = ["EMA", "AdamWEMA", "adamw_ema_", "ema_update_"]
