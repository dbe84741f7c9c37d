"""Images from paths and objects to uint8 batches: index, order, crops, decoders, loader.

Pillow and DALI are imported where they are first used, never by importing this package.
"""

from ijepa_fast.data.build import ADVICE, build_index, source_names
from ijepa_fast.data.cache import load_table, open_index, save_table
from ijepa_fast.data.central import Picture, central_picture
from ijepa_fast.data.crops import central_windows, crop_windows
from ijepa_fast.data.dali_decoder import DaliDecoder
from ijepa_fast.data.decoders import make_decoder
from ijepa_fast.data.index import Index, index_from_arrays, index_to_arrays
from ijepa_fast.data.loader import Batch, Loader, known_bad
from ijepa_fast.data.objects import Data, ImageSource, data_roots
from ijepa_fast.data.order import epoch_order, positions, steps_per_epoch, usable_ids
from ijepa_fast.data.pack import Packed, pack
from ijepa_fast.data.pillow_decoder import DecodeError, ImageDecoder, PillowDecoder, default_threads
from ijepa_fast.data.progress import progress
from ijepa_fast.data.quarantine import Quarantine
from ijepa_fast.data.reading import decode_usable
from ijepa_fast.data.sets.idx import cache_folder
from ijepa_fast.data.sets.named import NAMES, named_data

__all__ = [
    "ADVICE",
    "NAMES",
    "Batch",
    "DaliDecoder",
    "Data",
    "DecodeError",
    "ImageDecoder",
    "ImageSource",
    "Index",
    "Loader",
    "Packed",
    "Picture",
    "PillowDecoder",
    "Quarantine",
    "build_index",
    "cache_folder",
    "central_picture",
    "central_windows",
    "crop_windows",
    "data_roots",
    "decode_usable",
    "default_threads",
    "epoch_order",
    "index_from_arrays",
    "index_to_arrays",
    "known_bad",
    "load_table",
    "make_decoder",
    "named_data",
    "open_index",
    "pack",
    "positions",
    "progress",
    "save_table",
    "source_names",
    "steps_per_epoch",
    "usable_ids",
]
