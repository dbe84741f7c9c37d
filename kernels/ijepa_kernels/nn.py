"""Drop-in modules: subclasses of torch's own, with the same parameters and state dicts."""

from collections.abc import Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa_kernels.add_layer_norm import add_layer_norm
from ijepa_kernels.latent_loss import latent_loss
from ijepa_kernels.patchify import pad_patch_weight, patchify

__all__ = ["AddLayerNorm", "LatentLoss", "PatchConv2d"]


class AddLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of ``residual + x``, which also returns the sum.

    In a pre-norm block ``x = x + attn(norm1(x)); x = x + mlp(norm2(x))`` it takes the place of an
    addition and the norm behind it: ``x, y = norm2(x, attn(y))``. Takes the arguments of
    `nn.LayerNorm`; loads and gives its state dict.

    Raises:
        ValueError: more than one normalised dimension, no weight, or no bias.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"normalized_shape must be one dimension, got {tuple(self.normalized_shape)}"
            )
        if not (elementwise_affine and bias):
            raise ValueError(
                f"elementwise_affine and bias must be True, got {elementwise_affine} and {bias}"
            )

    def forward(  # type: ignore[override]  # a second input is the point
        self, residual: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Adds and normalises; see `ijepa_kernels.add_layer_norm`.

        Args:
            residual: (..., D).
            x: what to add, the same shape.

        Returns:
            residual + x in the residual's dtype, and its LayerNorm in x's.
        """
        return add_layer_norm(residual, x, self.weight, self.bias, self.eps)


class LatentLoss(nn.SmoothL1Loss):
    """`nn.SmoothL1Loss` against normalised rows of the target encoder's output.

    ``loss(prediction, features, index)`` takes the place of a gather, an `F.layer_norm` and
    ``loss(prediction, rows)``. Like `nn.SmoothL1Loss` it has no parameters and an empty state dict.

    Args:
        reduction: `mean` or `sum`.
        beta: where the square turns to the line.
        normalize: LayerNorm without affine of the target's rows, `eps` added to the variance.

    Raises:
        ValueError: another reduction.
    """

    def __init__(
        self,
        reduction: str = "mean",
        beta: float = 1.0,
        *,
        normalize: bool = True,
        eps: float = 1e-5,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
        super().__init__(reduction=reduction, beta=beta)
        self.normalize = normalize
        self.eps = eps

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        index: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        count: float | Tensor | None = None,
    ) -> Tensor:
        """The loss; see `ijepa_kernels.latent_loss`.

        Args:
            input: prediction (..., D), R rows in all.
            target: (S, D) or (B, N, D); without index the shape of the input.
            index: (R,) the target's row for each of the input; by default row by row.
            weight: (R,) factors of the rows.
            count: what the sum is divided by, instead of what `reduction` says.
        """
        if index is None:
            if target.shape != input.shape:
                raise ValueError(
                    f"target must have the input's shape {tuple(input.shape)} without index, "
                    f"got {tuple(target.shape)}"
                )
            target = target.reshape(-1, target.shape[-1])
            index = torch.arange(len(target), device=input.device)
        if count is None and self.reduction == "sum":
            count = 1
        return latent_loss(
            input,
            target,
            index,
            beta=self.beta,
            normalize=self.normalize,
            eps=self.eps,
            weight=weight,
            count=count,
        )


class PatchConv2d(nn.Conv2d):
    """`nn.Conv2d` that embeds patches (kernel = stride), of all patches or only the listed ones.

    Takes the arguments of `nn.Conv2d`, except that the stride may be left out; loads and gives its
    state dict. Images stay as decoded: `patchify` normalises and cuts, one matrix product embeds.

    Raises:
        ValueError: the stride is not the kernel size, or padding, dilation or groups are not those
            of a patch embedding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        stride = kernel_size if stride is None else stride
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        for name, value, allowed in (
            ("stride", self.stride, (self.kernel_size,)),
            ("padding", self.padding, ((0, 0), "valid")),
            ("dilation", self.dilation, ((1, 1),)),
            ("groups", self.groups, (1,)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be {allowed[0]} in a patch embedding, got {value}")

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> Self:
        """A patch embedding that shares the parameters of a convolution.

        Raises:
            ValueError: the convolution is not a patch embedding.
        """
        module = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]  # torch types it as any tuple
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        module.weight, module.bias = conv.weight, conv.bias
        return module.train(conv.training)

    def forward(  # more than nn.Conv2d takes
        self,
        images: Tensor,
        index: Tensor | None = None,
        *,
        mean: Tensor | Sequence[float] | None = None,
        std: Tensor | Sequence[float] | None = None,
        layout: str | None = None,
    ) -> Tensor:
        """Embeds patches; see `ijepa_kernels.patchify` for the arguments.

        Args:
            images: (B, C, H, W) or (B, H, W, C), uint8 or float; they get no gradient.
            index: (R,), image * N + patch; None for all patches in order.
            mean, std: of each channel.
            layout: "BCHW" or "BHWC"; None takes the dimension that has `in_channels`, where only
                one of the two has.

        Returns:
            (R, D) in the weight's dtype, or autocast's.

        Raises:
            ValueError: as `patchify`, or the images do not have `in_channels` channels.
        """
        layout = self._layout(images, layout)
        rows = patchify(
            images, self._patch_size, index, mean, std, self._compute_dtype(), layout=layout
        )
        return F.linear(rows, pad_patch_weight(self.weight), self.bias)

    @property
    def _patch_size(self) -> tuple[int, int]:
        height, width = self.kernel_size
        return height, width

    def _compute_dtype(self) -> torch.dtype:
        device = self.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.weight.dtype

    def _layout(self, images: Tensor, layout: str | None) -> str:
        places = {"BCHW": 1, "BHWC": 3}
        if images.ndim != 4 or (layout is not None and layout not in places):
            # patchify says what is wrong
            return layout or "BCHW"
        candidates = [layout] if layout else list(places)
        fitting = [name for name in candidates if images.shape[places[name]] == self.in_channels]
        if not fitting:
            raise ValueError(
                f"images must have {self.in_channels} channels in layout "
                f"{' or '.join(candidates)}, got {tuple(images.shape)}"
            )
        if len(fitting) > 1:
            raise ValueError(
                f"layout must be given for images of shape {tuple(images.shape)}: dimensions 1 and "
                f"3 both have {self.in_channels}"
            )
        return fitting[0]
