"""The training step of `reference.py`, fast: packed rows, fused kernels, weights kept rounded.

Who owns which weights: the parameters of context encoder and predictor are the float32 masters, and
so is each average in the state of `AdamWEMA`. The target encoder's matrices are what the optimiser
rounds the averages to (its norms are the averages themselves, float32). Unsharded, the optimiser
also writes rounded copies of the context side's matrices; sharded, FSDP2 rounds what it gathers. So
no step casts a weight.

Shape letters as in `layout.py`.
"""

import copy
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ijepa_fast.config import OptimConfig
from ijepa_fast.fast.attention import Pair, choose_attention
from ijepa_fast.fast.block import Memory, PackedBlock, Settings, attach_copies
from ijepa_fast.fast.float8 import Float8Block, check_device, round_weights
from ijepa_fast.fast.layout import Layout, grid_sequences, pack, views
from ijepa_fast.fast.networks import ContextEncoder, PackedPredictor, TargetEncoder
from ijepa_fast.fast.sharding import shard
from ijepa_fast.masks import Masks
from ijepa_fast.model import Predictor, VisionTransformer, matrix_layers
from ijepa_fast.ranks import all_reduce_sum_
from ijepa_fast.reference import (
    TARGET_NORM_EPS,
    any_bad,
    count_skip,
    parameter_groups,
    set_rates,
)
from ijepa_fast.schedules import StepValues
from ijepa_kernels import latent_loss
from ijepa_kernels.optim import AdamWEMA

__all__ = ["FastStep"]

_logger = logging.getLogger(__name__)

# devices on which the target encoder's trunk is captured
TRUNK_GRAPHS_ON = {"cuda"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class FastStep:
    """The networks of a run, their optimiser, and one training step; as `ReferenceStep`.

    Args:
        encoder: context encoder, with its initial weights, on the training device. Its parameters
            are used, not copied (sharded, they are replaced).
        predictor: predictor, likewise.
        config: loss, betas, eps, precision and residual.
        mean, std: of the image channels, in 0-1 units.
        attention: back end of packed attention, or `auto`.
        memory: what is recomputed in the backward pass, see `block.Settings`.
        mesh: shard all networks over it (FSDP2); None keeps them whole.
        target_precision: of the target encoder's products: `same` as the others, or `fp8`.
        trunk_graph: on CUDA, capture the target encoder's blocks, whose shapes never change.

    Raises:
        ValueError: the back end of attention or the target's precision cannot be used here.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        predictor: Predictor,
        config: OptimConfig,
        *,
        mean: Iterable[float],
        std: Iterable[float],
        attention: str = "auto",
        memory: Memory = "none",
        mesh: DeviceMesh | None = None,
        target_precision: Literal["same", "fp8"] = "same",
        trunk_graph: bool = True,
    ) -> None:
        self.config = config
        self.device = next(encoder.parameters()).device
        dtype = DTYPES[config.precision]
        self.num_patches = encoder.pos_embed.shape[1]
        firsts: list[Any] = [encoder.blocks[0], predictor.predictor_blocks[0]]
        shapes = [
            (self.num_patches // part, b.attn.heads, b.attn.proj.in_features // b.attn.heads)
            for part, b in enumerate(firsts, 1)
        ]
        self.settings = Settings(
            attention=choose_attention(attention, self.device, dtype, shapes),
            dtype=dtype,
            residual=DTYPES[config.residual],
            memory=memory,
            sharded=mesh is not None,
        )
        self.float8 = target_precision == "fp8"
        self._trunk_graph = trunk_graph and mesh is None
        if self.float8:
            if mesh is not None or dtype != torch.bfloat16:
                weights = "whole" if mesh is None else "sharded"
                raise ValueError(
                    "target_precision fp8 must have optim.precision bfloat16 and whole weights "
                    f"(--shard none), got {config.precision} and {weights} ones"
                )
            check_device(self.device)
        self._padded = self.settings.attention.packed.name == "sdpa"
        self.mesh = mesh
        self.mean = torch.tensor(tuple(mean), device=self.device)
        self.std = torch.tensor(tuple(std), device=self.device)
        plain_target = copy.deepcopy(encoder).requires_grad_(False)
        for layer in matrix_layers(plain_target):
            layer.to(dtype)
        if self.float8:
            # these are the averages themselves, and what products see is rounded from them
            for plain, block in zip(encoder.blocks, plain_target.blocks, strict=True):
                for mine, layer in zip(matrix_layers(plain), matrix_layers(block), strict=True):
                    layer.weight.data = mine.weight.detach().clone()
        self.encoder = ContextEncoder(encoder, self.settings)
        self.predictor = PackedPredictor(predictor, self.settings)
        block_kind = Float8Block if self.float8 else PackedBlock
        self.target_encoder = TargetEncoder(plain_target, self.settings, block_kind)
        if self.float8:
            round_weights(self.target_encoder)
        if mesh is not None:
            shard([self.encoder, self.predictor], mesh, dtype, trained=True)
            shard([self.target_encoder], mesh, dtype, trained=False)
        # lr, weight decay and momentum are set from the schedules before every update
        self.optimizer = AdamWEMA(
            parameter_groups([self.encoder, self.predictor]),
            lr=0.0,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            ema_form="sum",
        )
        self.optimizer.track(self.encoder, self.target_encoder)
        self.copies: list[tuple[nn.Parameter, Tensor]] = []
        if mesh is None and dtype != torch.float32:
            self.copies = [
                *attach_copies(self.encoder, dtype),
                *attach_copies(self.predictor, dtype),
            ]
            self.optimizer.mirror(*zip(*self.copies, strict=True))
        self.parameters = [p for g in self.optimizer.param_groups for p in g["params"]]
        for parameter in self.parameters:
            self.optimizer.initialise(parameter)
        # see `count_skip`
        self.skipped = torch.zeros(4, dtype=torch.int64, device=self.device)
        self._loss = torch.zeros((), device=self.device)
        self._grids: dict[int, Pair] = {}
        self._graph: _TrunkGraph | None = None

    def describe(self) -> str:
        """How the step runs, in two lines."""
        settings = self.settings
        shape = "whole on every rank" if self.mesh is None else f"sharded over {self.mesh.shape}"
        return (
            f"fast path: memory {settings.memory}, weights {shape}"
            f"{', products of the target encoder in float8' if self.float8 else ''}\n"
            f"attention: {settings.attention} ({settings.attention.why})"
        )

    # --- one step --------------------------------------------------------------------------------

    def prepare(self, masks: Masks) -> Layout:
        """Masks as sampled, on the CPU, to what a step takes; does not wait for the device."""
        flat, key = pack(masks, self.num_patches, padded=self._padded)
        tensor = torch.from_numpy(flat)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return views(tensor, key)

    def forward(self, images: Tensor, batch: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Both sides of the loss.

        Args:
            images: uint8 (B, height, width, 3) on the training device.
            batch: from `prepare`.

        Returns:
            Prediction (M, C, B, T, D), latent target (M, B, T, D), and the target encoder's
            features of the needed rows (U, D).
        """
        features, prediction = self._both(images, batch)
        key, width = batch.key, features.shape[-1]
        real = key.contexts * key.images * key.length  # before the fillers, if any
        target = F.layer_norm(features, (width,), eps=TARGET_NORM_EPS)
        target = target.index_select(0, batch.loss_index)
        shape = (key.blocks, key.contexts, key.images, key.length, width)
        prediction, target = (
            t.view(key.blocks, -1, width)[:, :real].view(shape) for t in (prediction, target)
        )
        return prediction, target[:, 0], features

    def accumulate(
        self, images: Tensor, batch: Layout, elements: int, *, last: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-step; gradients add to those already there.

        Args:
            images: uint8 (B, height, width, 3) on the training device.
            batch: from `prepare`.
            elements: elements of the predictions of the whole global batch, over all ranks and
                micro-steps; the loss is the mean over them.
            last: of its optimiser step: sharded gradients are reduced over the ranks then, and
                until then add up unsharded, in float32.

        Returns:
            This micro-step's share of the loss, and the standard deviation of the target encoder's
            features over the rows that some target needs, mean over channels: scalars on the
            device.
        """
        if self.mesh is not None:
            for network in (self.encoder, self.predictor):
                assert isinstance(network, FSDPModule)
                network.set_requires_gradient_sync(last)
        loss, std = self._backward(images, batch, elements)
        self._loss += loss
        return loss, std

    def _backward(self, images: Tensor, batch: Layout, elements: int) -> tuple[Tensor, Tensor]:
        features, prediction = self._both(images, batch)
        loss = latent_loss(
            prediction,
            features,
            batch.loss_index,
            kind=self.config.loss,
            eps=TARGET_NORM_EPS,
            weight=batch.loss_weight,
            count=float(elements),
        )
        loss.backward()
        return loss.detach(), _std(features, batch)

    def _both(self, images: Tensor, batch: Layout) -> tuple[Tensor, Tensor]:
        """Features of the needed rows, and the prediction's rows."""
        features = self._target(images, batch)
        z = self.encoder(images, self.mean, self.std, batch)
        return features, self.predictor(z, batch)

    def _target(self, images: Tensor, batch: Layout) -> Tensor:
        count = len(images)
        if count not in self._grids:
            self._grids[count] = grid_sequences(count, self.num_patches, self.device)
        grid = self._grids[count]
        if self.device.type not in TRUNK_GRAPHS_ON or not self._trunk_graph:
            return self.target_encoder(images, self.mean, self.std, batch, grid)
        if self._graph is None or not self._graph.fits(images):
            self._graph = _TrunkGraph(
                lambda pixels: self.target_encoder.trunk(pixels, self.mean, self.std, grid), images
            )
        x, normed, keys_values = self._graph(images)
        return self.target_encoder.head(x, normed, keys_values, batch)

    @torch.no_grad()
    def update(self, values: StepValues) -> None:
        """Reduces the gradients over ranks, then AdamW and the EMA of the updated weights, in one
        pass.

        A step with a non-finite loss or gradient, on any rank, changes neither weights, moments,
        Adam's step count nor the target encoder; ``skipped`` counts it. Nothing is read back to
        the host.
        """
        gradients = [p.grad for p in self.parameters]
        assert type(None) not in map(type, gradients), "update() before accumulate()"
        shards = gradients
        if self.mesh is None:
            all_reduce_sum_(shards)
        else:
            shards = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        bad = any_bad(shards, self._loss)
        set_rates(self.optimizer, values)
        self._update(bad)
        self.skipped = count_skip(self.skipped, bad)
        self.optimizer.zero_grad(set_to_none=True)
        self._loss.zero_()

    def _update(self, bad: Tensor) -> None:
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # as GradScaler sets it
        self.optimizer.step()
        if self.float8:
            round_weights(self.target_encoder)

    # --- what a checkpoint holds -----------------------------------------------------------------

    def masters(self) -> dict[str, Tensor]:
        """The float32 weights and tables of all three networks, by name; DTensors where sharded."""
        tensors = {
            f"{name}.{key}": value
            for name, network in (("encoder", self.encoder), ("predictor", self.predictor))
            for key, value in network.state_dict().items()
        }
        averages = {
            key: self.optimizer.state[parameter]["ema"]
            for key, parameter in self.encoder.named_parameters()
        }
        for key, value in self.target_encoder.state_dict().items():
            tensors[f"target_encoder.{key}"] = averages.get(key, value)
        return tensors

    @torch.no_grad()
    def round(self) -> None:
        """Writes all rounded weights, after something else than `update` changed the masters."""
        for key, parameter in self.encoder.named_parameters():
            target = self.target_encoder.get_parameter(key)
            target.copy_(self.optimizer.state[parameter]["ema"])
        for parameter, rounded in self.copies:
            rounded.copy_(parameter)
        if self.float8:
            round_weights(self.target_encoder)


def _std(features: Tensor, batch: Layout) -> Tensor:
    """Standard deviation over the rows that some target needs, mean over channels."""
    weight = batch.counted[:, None]
    count = weight.sum()
    centred = (features - (features * weight).sum(dim=0) / count) * weight
    return (centred.square().sum(dim=0) / (count - 1)).sqrt().mean()


class _TrunkGraph:
    """A CUDA graph of the target encoder's trunk: one launch instead of some hundred.

    Args:
        trunk: images to tensors, whose shapes never change.
        images: of the shape to capture.
    """

    def __init__(self, trunk: Callable[[Tensor], tuple[Tensor, ...]], images: Tensor) -> None:
        self.images = images.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries allocate
                trunk(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads (loader, saver) may allocate meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = trunk(self.images)
        _logger.info("target encoder: captured as a CUDA graph for %d images", len(images))

    def fits(self, images: Tensor) -> bool:
        """Whether the graph is for images of this shape."""
        return images.shape == self.images.shape

    def __call__(self, images: Tensor) -> tuple[Any, ...]:
        """Replays; the outputs are overwritten by the next replay."""
        self.images.copy_(images)
        self.graph.replay()
        return self.outputs
