"""The target encoder's products in float8 (e4m3): half of all FLOPs of a step, without gradients.

Every row of both operands has a scale of its own. The norm, the GELU and the pass over the weights
hold whole rows, so the largest value of a row is there for nothing, no history of scales has to be
kept, and nothing saturates; one scale for a tensor would need its maximum before its first value is
written. Accuracy is the same with either: 3 bits of mantissa are what is lost, at any scale.
Attention's output takes a pass of its own, 3 bytes an element.

Weights are rounded from the float32 averages, which are the target's own parameters here: a pass
after every update that reads 4 bytes and writes 1 a weight, where the optimiser writes no bfloat16
copy (2); AdamW and the average move 40. It is apart from them because their blocks of flat memory
know no rows. Embedding, biases and norms stay as they are.

Products add up as tensor cores do fastest (`use_fast_accum`): on Hopper with fewer bits than
float32 has, which are still many more than the operands have.

Shape letters: R packed rows, D width, U taken rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_fast.fast.attention import Pair
from ijepa_fast.fast.block import Branch, PackedBlock
from ijepa_kernels.add_layer_norm import add_layer_norm_float8
from ijepa_kernels.gather_tokens import Gather, gather_rows
from ijepa_kernels.gelu import gelu_float8
from ijepa_kernels.quantize_rows import Float8Rows, quantize_rows

__all__ = ["Float8Block", "check_device", "product", "round_weights"]

_BY_ROWS = F.ScalingType.RowWise


def check_device(device: torch.device) -> None:
    """Raises ValueError where products in float8 cannot be computed."""
    if device.type == "cuda" and (has := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            "target_precision fp8 must run on a GPU of compute capability 8.9 or higher "
            f"(Ada, Hopper, Blackwell), got {has[0]}.{has[1]}"
        )


def product(y: Float8Rows, weight: Float8Rows, bias: Tensor) -> Tensor:
    """y weight^T + bias, (R, out), in the bias's dtype.

    Args:
        y: (R, in).
        weight: (out, in).
        bias: (out,), bfloat16.
    """
    return F.scaled_mm(
        *(y.rows, weight.rows.t(), y.scale, _BY_ROWS, weight.scale.t(), _BY_ROWS),
        bias=bias,
        output_dtype=bias.dtype,
        use_fast_accum=True,
    )


def _part(weight: Float8Rows, rows: slice) -> Float8Rows:
    return Float8Rows(weight.rows[rows], weight.scale[rows])


def _take(y: Float8Rows, index: Tensor) -> Float8Rows:
    # values are moved as they are, four at a time
    rows = gather_rows(y.rows.view(torch.float32), index).view(y.rows.dtype)
    return Float8Rows(rows, gather_rows(y.scale, index))


def _layers(block: PackedBlock) -> tuple[nn.Linear, ...]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Rounds the weights of all blocks of float8 products, into the same memory each time."""
    for block in network.modules():
        if isinstance(block, Float8Block):
            for layer in _layers(block):
                # neither parameter nor buffer: no part of the state dict
                known = layer.__dict__.get("rounded")
                layer.__dict__["rounded"] = quantize_rows(layer.weight, known)


class Float8Block(PackedBlock):
    """`PackedBlock` without gradients, its products in float8; after `round_weights`."""

    @torch.no_grad()
    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        f: Branch | None,
        pair: Pair,
        take: Gather | None = None,
        source: Gather | None = None,
    ) -> tuple[Tensor, Branch]:
        """See `PackedBlock.forward`; there is no `source`."""
        assert source is None
        if take is not None:
            return self.finish(*self.keys_values(x, f, pair), pair, take.picked)
        x, y = self._norm(self.norm1, x, f)
        qkv = self._product(self.attn.qkv, y)
        q, k, v = qkv.view(len(qkv), 3, self.attn.heads, -1).unbind(1)
        return self._attend(x, q, k, v, pair)

    @torch.no_grad()
    def keys_values(
        self,
        x: Tensor,
        f: Branch | None,
        pair: Pair,
    ) -> tuple[Tensor, Any, Tensor]:
        """See `PackedBlock.keys_values`; the normalised rows are in float8."""
        x, y = self._norm(self.norm1, x, f)
        return x, y, self._product(self.attn.qkv, y, slice(x.shape[1], None))

    @torch.no_grad()
    def finish(
        self, x: Tensor, normed: Any, keys_values: Tensor, pair: Pair, take: Tensor
    ) -> tuple[Tensor, Branch]:
        """See `PackedBlock.finish`."""
        q = self._product(self.attn.qkv, _take(normed, take), slice(x.shape[1]))
        q = q.view(len(q), self.attn.heads, -1)
        k, v = keys_values.view(len(keys_values), 2, *q.shape[1:]).unbind(1)
        return self._attend(gather_rows(x, take), q, k, v, pair)

    def _attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, pair: Pair
    ) -> tuple[Tensor, Branch]:
        """Attention and everything behind it."""
        out, _ = self.settings.attention.of(pair).forward(q, k, v, pair, False)
        branch = self._product(self.attn.proj, quantize_rows(out.flatten(1)))
        x, y = self._norm(self.norm2, x, Branch(branch, self.attn.proj))
        hidden = self._product(self.mlp.fc1, y)
        return x, Branch(self._product(self.mlp.fc2, gelu_float8(hidden)), self.mlp.fc2)

    def _norm(self, layer: nn.LayerNorm, x: Tensor, f: Branch | None) -> tuple[Tensor, Float8Rows]:
        rows = None if f is None else f.rows
        return add_layer_norm_float8(x, rows, layer.weight, layer.bias, layer.eps)

    def _product(self, layer: nn.Linear, y: Float8Rows, rows: slice = slice(None)) -> Tensor:
        """The layer's product, or that of some of its outputs."""
        return product(y, _part(layer.__dict__["rounded"], rows), layer.bias[rows])
