"""Images from folders, lists and shards to uint8 batches: index, order, crops, decoders, loader.

Pillow and DALI are imported where they are first used, never by importing this package.
"""

from ijepa_fast.data.batch import Batch
from ijepa_fast.data.build import build_index
from ijepa_fast.data.cache import open_index
from ijepa_fast.data.crops import crop_windows
from ijepa_fast.data.decoders import (
    DaliDecoder,
    DecodeError,
    Decoder,
    PillowDecoder,
    default_threads,
    make_decoder,
)
from ijepa_fast.data.index import Index, index_from_arrays, index_to_arrays
from ijepa_fast.data.loader import Loader
from ijepa_fast.data.order import epoch_order, positions, replacement_id, steps_per_epoch
from ijepa_fast.data.quarantine import Quarantine, TooManyBadFiles

__all__ = [
    "Batch",
    "DaliDecoder",
    "DecodeError",
    "Decoder",
    "Index",
    "Loader",
    "PillowDecoder",
    "Quarantine",
    "TooManyBadFiles",
    "build_index",
    "crop_windows",
    "default_threads",
    "epoch_order",
    "index_from_arrays",
    "index_to_arrays",
    "make_decoder",
    "open_index",
    "positions",
    "replacement_id",
    "steps_per_epoch",
]
