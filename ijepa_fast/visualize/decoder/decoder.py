"""A decoder from pooled predictions to pixels: training, sampling, and its file.

Shows what the predictor knows of a hidden block (paper, section 6, does so with RCDM): the decoder
is trained to paint a block given only the predictor's output for it, averaged over the block's
patches, and the block's place. I-JEPA is frozen. What differs between samples is what the
prediction leaves open; what stays is what it holds.
"""

import copy
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ijepa_fast._torch import foreach_lerp_
from ijepa_fast.atomic import atomic_write
from ijepa_fast.errors import UsageError
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.state import fsync, safetensors_pieces, sha256_of, write_file
from ijepa_fast.visualize.decoder.conditions import Conditions
from ijepa_fast.visualize.decoder.diffusion import Denoiser, Told, add_noise, ddim, velocity
from ijepa_fast.visualize.inputs import Networks, device

__all__ = [
    "Budget",
    "Decoder",
    "check_free",
    "load_decoder",
    "require_match",
    "save_decoder",
    "train_decoder",
]

_logger = logging.getLogger(__name__)

FORMAT = "ijepa-fast decoder"
VERSION = 1
BATCH = 64
LEARNING_RATE = 3e-3
WARMUP = 100
# condition vectors kept back in training, so that guidance is possible
DROP = 0.1
EMA = 0.999
REPORT_SECONDS = 15.0
_SMALLEST_STD = 1e-6


class Budget(NamedTuple):
    """When training ends: after so many minutes or steps, whichever comes first.

    Attributes:
        minutes: wall clock; the learning rate then follows the clock, and two trainings differ.
        steps: reproducible to the bit on one machine.
    """

    minutes: float | None
    steps: int | None

    def done(self, started: float, step: int) -> float:
        """Share of the budget that is used up, 1 at the end."""
        shares = []
        if self.minutes is not None:
            shares.append((time.monotonic() - started) / (60 * self.minutes))
        if self.steps is not None:
            shares.append(step / self.steps)
        return min(1.0, max(shares))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A trained decoder.

    Attributes:
        denoiser: with the averaged weights, on the device to sample on.
        mean, std: (D,) of the condition vectors it was trained on.
        about: plain JSON values: the checkpoint that it belongs to and how it was trained.
    """

    denoiser: Denoiser
    mean: Tensor
    std: Tensor
    about: Mapping[str, Any]

    @property
    def side(self) -> int:
        """Side of the squares, pixels."""
        return self.denoiser.side

    @torch.no_grad()
    def sample(
        self, given: Conditions, *, seed: int, steps: int = 30, guidance: float = 1.0
    ) -> Tensor:
        """One completion of each block.

        Args:
            given: n blocks; their pixels and images are not looked at.
            seed: of the first noise, which depends on the seed and the row only.
            steps: network evaluations.
            guidance: 1 samples what was learnt; more exaggerates what the vector says against
                what the place alone says (classifier-free guidance, arXiv 2207.12598).

        Returns:
            uint8 (n, side, side, 3), on the CPU.
        """
        where = self.mean.device
        told = Told(*(part.to(where) for part in _told(given, self.mean, self.std)))
        generator = torch_generator(seed, Stream.SAMPLE)
        shape = (len(given), 3, self.side, self.side)
        noise = torch.randn(shape, generator=generator).to(where)
        pieces = []
        for start in range(0, len(given), 256):
            part = slice(start, start + 256)
            some = told.rows(part)

            def predict(x: Tensor, t: Tensor, some: Told = some) -> Tensor:
                v = self.denoiser(x, t, some)
                if guidance != 1.0:
                    without = self.denoiser(x, t, some.kept_back())
                    v = without + guidance * (v - without)
                return v

            pieces.append(ddim(predict, noise[part], steps=steps).cpu())
        pixels = (torch.cat(pieces) + 1) * 127.5
        return pixels.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def _told(given: Conditions, mean: Tensor, std: Tensor) -> Told:
    vector = (given.pooled - mean.cpu()) / std.cpu()
    rows, columns = given.grid
    place = given.box.float() / torch.tensor([rows, columns, rows, columns])
    return Told(vector, torch.ones(len(given), 1), place)


def train_decoder(
    given: Conditions,
    budget: Budget,
    *,
    about: Mapping[str, Any],
    seed: int = 0,
    width: int = 32,
) -> Decoder:
    """Trains a decoder on blocks of training images; the loss is logged now and then.

    Args:
        given: the blocks.
        budget: when to end.
        about: kept in the decoder's file, with steps, last loss and seed added.
        seed: of initial weights, batches, times and noise.
        width: of the denoiser.
    """
    where = device()
    generator = torch_generator(seed, Stream.DECODER)
    side = given.pixels.shape[1]
    denoiser = Denoiser(side=side, vector=given.pooled.shape[1], width=width)
    denoiser.initialise(generator)
    denoiser = denoiser.to(where)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    mean = given.pooled.double().mean(dim=0).float()
    std = given.pooled.double().std(dim=0).clamp_min(_SMALLEST_STD).float()
    told = _told(given, mean, std)
    parameters: list[Tensor] = list(denoiser.parameters())
    averaged: list[Tensor] = list(average.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.0, betas=(0.9, 0.99))
    started = reported = time.monotonic()
    step, losses, last = 0, [], math.nan
    while (done := budget.done(started, step)) < 1 or step == 0:
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        for group in optimizer.param_groups:
            group["lr"] = rate * (0.5 + 0.5 * math.cos(math.pi * done))
        rows = torch.randint(len(given), (BATCH,), generator=generator)
        t = torch.rand(BATCH, generator=generator)
        noise = torch.randn((BATCH, 3, side, side), generator=generator)
        kept = (torch.rand((BATCH, 1), generator=generator) >= DROP).float()
        x0 = given.pixels[rows].permute(0, 3, 1, 2).float() / 127.5 - 1
        x0, t, noise, kept = (part.to(where) for part in (x0, t, noise, kept))
        some = Told(*(part.to(where) for part in told.rows(rows)))._replace(known=kept)
        loss = F.mse_loss(denoiser(add_noise(x0, noise, t), t, some), velocity(x0, noise, t))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        decay = min(EMA, (1 + step) / (10 + step))
        with torch.no_grad():
            foreach_lerp_(averaged, parameters, 1 - decay)
        losses.append(loss.detach())
        if time.monotonic() - reported > REPORT_SECONDS:
            reported, last, losses = time.monotonic(), float(torch.stack(losses).mean()), []
            _logger.info("step %d (%.0f %%): loss %.4f", step, 100 * done, last)
    last = float(torch.stack(losses).mean()) if losses else last
    return Decoder(
        denoiser=average,
        mean=mean.to(where),
        std=std.to(where),
        about={**about, "steps": step, "loss": last, "seed": seed, "blocks": len(given)},
    )


def check_free(folder: Path) -> None:
    """Before any work: a decoder can be written there and nothing is lost.

    Raises:
        UsageError: the folder is there already, or its parent is not.
    """
    if folder.exists():
        raise UsageError(f"out must not exist, got {folder}")
    if not folder.parent.is_dir():
        raise UsageError(f"out must be in an existing folder, got {folder}")


def save_decoder(folder: Path, decoder: Decoder) -> None:
    """Writes `decoder.safetensors` and `decoder.json` into a new folder, both or none.

    Raises:
        UsageError: the folder is there already.
        OSError: it cannot be written.
    """
    check_free(folder)
    tensors = {f"denoiser.{k}": v.cpu() for k, v in decoder.denoiser.state_dict().items()}
    tensors |= {"mean": decoder.mean.cpu(), "std": decoder.std.cpu()}
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        written = write_file(temporary / "decoder.safetensors", safetensors_pieces(tensors))
        header = {
            "format": FORMAT,
            "version": VERSION,
            "side": decoder.side,
            "vector": len(decoder.mean),
            "width": decoder.denoiser.width,
            "weights": written,
            "about": dict(decoder.about),
        }
        write_file(temporary / "decoder.json", [(json.dumps(header, indent=1) + "\n").encode()])
        fsync(temporary)
    fsync(folder.parent)


def load_decoder(folder: Path) -> Decoder:
    """Reads and verifies a decoder.

    Raises:
        UsageError: it is not there, damaged, or of another format.
    """
    if not (folder / "decoder.json").is_file():
        raise UsageError(
            f"decoder must be the folder of a decoder (made by train-decoder), got {folder}"
        )
    try:
        header = json.loads((folder / "decoder.json").read_text())
        if (header["format"], header["version"]) != (FORMAT, VERSION):
            raise UsageError(
                f"decoder must be of format {FORMAT!r} {VERSION}, "
                f"got {header['format']!r} {header['version']!r} in {folder}"
            )
        if sha256_of(folder / "decoder.safetensors") != header["weights"]["sha256"]:
            raise UsageError(f"decoder must match the SHA-256 in its JSON, got {folder}")
        tensors = load_file(folder / "decoder.safetensors")
        sizes = {name: int(header[name]) for name in ("side", "vector", "width")}
        # so that a forged file asks for no memory that its weights do not have
        with torch.device("meta"):
            denoiser = Denoiser(**sizes)
        weights = {
            k.removeprefix("denoiser."): v for k, v in tensors.items() if k.startswith("denoiser.")
        }
        denoiser.load_state_dict(weights, assign=True)
        mean, std = tensors["mean"], tensors["std"]
        if mean.shape != (sizes["vector"],) or std.shape != mean.shape:
            raise ValueError(f"mean and std must be ({sizes['vector']},), got {mean.shape}")
        about = dict(header["about"])
    except UsageError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"decoder is damaged ({reason}), got {folder}") from None
    where = device()
    return Decoder(
        denoiser=denoiser.to(where).requires_grad_(False),
        mean=mean.to(where),
        std=std.to(where),
        about=about,
    )


def require_match(decoder: Decoder, networks: Networks, folder: Path) -> None:
    """A decoder understands only the predictor that it was trained with.

    Raises:
        UsageError: it belongs to another checkpoint, run or configuration.
    """
    digest = str(decoder.about.get("digest"))
    if digest != networks.digest:
        raise UsageError(
            f"decoder must belong to this checkpoint (step {networks.step}, digest "
            f"{networks.digest[:12]}), got one of step {decoder.about.get('step')} of "
            f"{decoder.about.get('run')}, digest {digest[:12]}, in {folder}; train one with "
            "train-decoder"
        )
