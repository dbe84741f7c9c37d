"""An encoder as an ONNX file, for programs without PyTorch.

The graph takes images as they are decoded and normalises them itself:

- input ``images``: uint8 (batch, height, width, 3), any batch, of the size it was trained at;
- output ``features``: float32 (batch, D), the mean over patches;
- output ``patches``: float32 (batch, N, D), row by row.

What shapes do not tell stands in the file's metadata, as JSON under ``ijepa_fast``. Weights of more
than 1.5 GiB are a second file, ``model.onnx.data``, as an ONNX file holds at most 2 GiB.
"""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.errors import UsageError
from ijepa_fast.weights.encoder import Encoder

__all__ = ["require_onnx", "write_onnx"]

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_INLINE_BYTES = 3 * 2**29
_TOLERANCE = 1e-4


def require_onnx() -> None:
    """Refuses where a package is missing.

    Raises:
        UsageError: it names them and says what to type.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"format onnx needs {', '.join(missing)}: pip install 'ijepa-fast[onnx]'")


class _Graph(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.encoder.forward_features(self.encoder.normalise(images))
        return patches.mean(dim=1), patches


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporter warns of its own code and of packages that nothing here needs; whether
    its file is right is seen by running it.
    """
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def write_onnx(encoder: Encoder, path: Path, metadata: Mapping[str, str]) -> None:
    """Writes the file and holds it against the encoder, with onnxruntime on the CPU.

    Args:
        encoder: on the CPU, in evaluation mode.
        path: the file; one of large weights has another beside it, see above.
        metadata: strings for the file.

    Raises:
        OSError: it cannot be written, or a feature differs by more than 1e-4 of the features' root
            mean square.
    """
    graph = _Graph(encoder).eval()
    images = _images(encoder)
    with _quiet():
        program = torch.onnx.export(
            graph,
            (images[:2],),
            input_names=["images"],
            output_names=["features", "patches"],
            dynamic_shapes={"images": {0: "batch"}},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update(metadata)
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    program.save(path, external_data=size > _INLINE_BYTES)
    del program
    _compare(graph, path, images)


def _images(encoder: Encoder) -> Tensor:
    """Four images: two of noise, two as smooth as photographs."""
    size = [side * encoder.patch_size for side in encoder.grid]
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 3, *size, generator=generator)
    smooth = F.interpolate(torch.rand(2, 3, 4, 4, generator=generator), size, mode="bicubic")
    images = torch.cat([noise, smooth]).mul(255).clamp(0, 255)
    return images.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _compare(graph: _Graph, path: Path, images: Tensor) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in (images[:1], images[1:]):
        with torch.inference_mode():
            expected = graph(batch)
        for name, ours, there in zip(
            ("features", "patches"),
            expected,
            session.run(None, {"images": batch.numpy()}),
            strict=True,
        ):
            difference = (torch.from_numpy(there) - ours).abs().max() / ours.square().mean().sqrt()
            # not so for NaN either
            if not difference <= _TOLERANCE:
                raise OSError(
                    f"{name} of {path.name} must differ by at most {_TOLERANCE:g} of their root "
                    f"mean square in onnxruntime, got {float(difference):.2g}"
                )
