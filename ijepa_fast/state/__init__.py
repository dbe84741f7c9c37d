"""What a run leaves on disk and goes on from (checkpoints, metrics, its folder), and its time."""

from ijepa_fast.state.allowance import Allowance
from ijepa_fast.state.checkpoint import HasState, checkpoint_folders, load_latest, misfit
from ijepa_fast.state.durable import fsync, require_room, safetensors_pieces, sha256_of, write_file
from ijepa_fast.state.metrics import Journal, Meter, Watch, id_hash, peak_flops
from ijepa_fast.state.preparation import Preparation
from ijepa_fast.state.run_folder import Console, RunFolder
from ijepa_fast.state.sample_log import SampleLog
from ijepa_fast.state.saves import Saves

__all__ = [
    "Allowance",
    "Console",
    "HasState",
    "Journal",
    "Meter",
    "Preparation",
    "RunFolder",
    "SampleLog",
    "Saves",
    "Watch",
    "checkpoint_folders",
    "fsync",
    "id_hash",
    "load_latest",
    "misfit",
    "peak_flops",
    "require_room",
    "safetensors_pieces",
    "sha256_of",
    "write_file",
]
