"""Images as decoded to normalised patch rows, ready for the embedding's matrix product.

    out[r, (c * ph + y) * pw + x] = (image[c, top + y, left + x] / 255 - mean[c]) / std[c]

for the patch (image, top, left) of row r: every patch of the batch in order, or the listed ones.
Float images are not divided by 255. K = C * ph * pw, in the order of a flattened Conv2d weight, is
padded with zeros to a multiple of 16: with a weight padded likewise, the convolution is one aligned
matrix product, ``F.linear(patchify(...), weight, conv.bias)``.

Fused: scaling, normalisation, the cut into patches, the choice of rows, padding and the cast. Bytes
of a row of 14 x 14 x 3 uint8 to bfloat16: 588 read, 1184 written = 1772. Unfused (to float32, three
times arithmetic, cut, choose, pad, cast) 588 + 12 x 2352 + 2 x 2368 + 1184 = 34732, most of it for
every patch, listed or not.

A thread holds BLOCK_V neighbouring positions of one patch in all channels, as many as one aligned
store of a channel takes (16 bytes for 16 x 16 patches; 8 for 14 x 14, whose second channel
starts 8 bytes off a multiple of 16). Of packed RGB bytes it loads RUN pixels as three words of RUN
bytes and takes the words apart in registers: no byte gathers, no shared memory.

Shape letters: B images, C channels, N patches of an image, R rows, K as above.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ijepa_kernels._checks import check_dtype, check_index, check_range, check_shape, debugging
from ijepa_kernels._launch import run
from ijepa_kernels._op import define

__all__ = ["patchify", "patchify_bytes", "patchify_ref"]

Maybe = Tensor | None
ALIGNMENT = 16


def patchify_ref(
    images: Tensor,
    patch_size: tuple[int, int],
    index: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    *,
    layout: str = "BCHW",
) -> Tensor:
    """The specification, in plain torch."""
    x = images.permute(0, 3, 1, 2) if layout == "BHWC" else images
    x = x.to(torch.promote_types(torch.promote_types(x.dtype, out_dtype), torch.float32))
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None and std is not None:
        x = (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    x = x.unflatten(3, (-1, patch_size[1])).unflatten(2, (-1, patch_size[0]))
    rows = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
    if index is not None:
        rows = rows[index.long()]
    return F.pad(rows, (0, -rows.shape[1] % ALIGNMENT)).to(out_dtype)


def patchify_bytes(
    rows: int,
    channels: int,
    patch_size: tuple[int, int],
    image_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    index_dtype: torch.dtype | None = None,
) -> int:
    """Bytes that have to move at least: the pixels of the rows read once, the rows written once."""
    k = channels * patch_size[0] * patch_size[1]
    index = index_dtype.itemsize if index_dtype else 0
    row = k * image_dtype.itemsize + _padded(k) * out_dtype.itemsize + index
    return rows * row + 2 * channels * 4


def _padded(k: int) -> int:
    return k + -k % ALIGNMENT


# --- launch table --------------------------------------------------------------------------------

# lanes of a program, with one warp for 32; and how many rows a lane works on, at the same positions
# of the patch, which it therefore works out once
LANES, LANE_ROWS = 256, 2
# channels that one program writes: all, or one where there are more than these
MAX_CHANNELS = 4


def _vector(patch_size: tuple[int, int], out_itemsize: int) -> int:
    """Positions of a thread: at most 16 bytes of output, and at most one line's end among them."""
    ph, pw = patch_size
    return min(math.gcd(ph * pw, 16 // out_itemsize), 1 << (pw.bit_length() - 1))


def _run(patch_width: int, vector: int, *alignments: int) -> int:
    """Pixels of packed RGB to load as three words; 0 to load bytes one by one."""
    run = math.gcd(patch_width, min(vector, 4), *alignments)
    return run if run >= 2 and vector <= 2 * run else 0


@functools.cache
def _constants(sizes: tuple[int, ...], byte_images: bool, out_itemsize: int) -> dict[str, Any]:
    """What the kernel is compiled for, in its order."""
    channels, height, width, stride_c, stride_y, stride_x, ph, pw, address = sizes
    vector = _vector((ph, pw), out_itemsize)
    packed_rgb = byte_images and (channels, stride_c, stride_x) == (3, 1, 3)
    k = channels * ph * pw
    return {
        "SCALE": 255.0 if byte_images else 1.0,
        "C": channels,
        "PH": ph,
        "PW": pw,
        "PATCHES_ACROSS": width // pw,
        "N": (height // ph) * (width // pw),
        "STRIDE_C": stride_c,
        "STRIDE_Y": stride_y,
        "STRIDE_X": stride_x,
        "K_PADDED": _padded(k),
        "BLOCK_V": vector,
        "RUN": _run(pw, vector, stride_y, address) if packed_rgb else 0,
        "LANE_GROUPS": min(ph * pw // vector, LANES),
        "BLOCK_C": channels if channels <= MAX_CHANNELS else 1,
        "BLOCK_I": LANE_ROWS,
        "BLOCK_L": LANES,
        "PAD": triton.next_power_of_2(_padded(k) - k),
    }


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _three_words(pixel, mask, RUN: tl.constexpr):
    WORD: tl.constexpr = tl.uint16 if RUN == 2 else tl.uint32
    word = pixel.to(tl.pointer_type(WORD))
    first, second = tl.load(word, mask=mask, other=0), tl.load(word + 1, mask=mask, other=0)
    return first, second, tl.load(word + 2, mask=mask, other=0)


@triton.jit(do_not_specialize=["R", "SOURCE_ROWS"])
def _patchify_fwd_kernel(
    images_ptr,
    index_ptr,
    mean_ptr,
    std_ptr,
    out_ptr,
    R,
    SOURCE_ROWS,
    HAS_INDEX: tl.constexpr,
    NORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    C: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    PATCHES_ACROSS: tl.constexpr,
    N: tl.constexpr,
    STRIDE_C: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    K_PADDED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    RUN: tl.constexpr,
    LANE_GROUPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_L: tl.constexpr,
    PAD: tl.constexpr,
):
    K: tl.constexpr = C * PH * PW
    GROUPS: tl.constexpr = PH * PW // BLOCK_V
    ROWS: tl.constexpr = BLOCK_L // LANE_GROUPS
    # rows (BLOCK_I, BLOCK_L): ROWS of them side by side in the lanes, BLOCK_I one after another
    lane = tl.arange(0, BLOCK_L)
    in_turn = tl.arange(0, BLOCK_I) * ROWS
    row = tl.program_id(0).to(tl.int64) * (BLOCK_I * ROWS) + (
        in_turn[:, None] + (lane // LANE_GROUPS)[None, :]
    )
    # a group is BLOCK_V positions of a patch
    group = lane % LANE_GROUPS
    has_group = lane < ROWS * LANE_GROUPS
    if GROUPS > LANE_GROUPS:
        group += (tl.program_id(1).to(tl.int64) * LANE_GROUPS).to(tl.int32)
        has_group &= group < GROUPS
    mask = has_group[None, :] & (row < R)

    if HAS_INDEX:
        source = tl.load(index_ptr + row, mask=mask, other=-1)
        ok = (source >= 0) & (source < SOURCE_ROWS)
    else:
        source = row
        ok = mask
    source = tl.where(ok, source, 0).to(tl.int32).to(tl.uint32, bitcast=True)
    patch = source % N
    corner = (patch // PATCHES_ACROSS) * (PH * STRIDE_Y) + (patch % PATCHES_ACROSS) * (
        PW * STRIDE_X
    )
    pixel = images_ptr + ((source // N).to(tl.int64) * (N * K) + corner.to(tl.int64))
    position = group * BLOCK_V
    x = position % PW
    pixel += ((position // PW) * STRIDE_Y + x * STRIDE_X)[None, :]
    step = tl.arange(0, BLOCK_V)
    out = out_ptr + (row * K_PADDED)[:, :, None] + (position[:, None] + step[None, :])[None, :, :]
    channel = 0
    if BLOCK_C < C:
        channel = tl.program_id(2).to(tl.int64)
        out += channel * (PH * PW)
        if NORMALISE:
            mean_ptr, std_ptr = mean_ptr + channel, std_ptr + channel
    if RUN > 0:
        word_0, word_1, word_2 = _three_words(pixel, ok, RUN)
        if BLOCK_V > RUN:
            # the next run lies in the next line where this one ends the patch's
            pixel += tl.where(x + RUN >= PW, RUN * 3 + STRIDE_Y - PW * 3, RUN * 3)[None, :]
            word_3, word_4, word_5 = _three_words(pixel, ok, RUN)
    else:
        steps = (step * STRIDE_X)[None, :]
        if PW % BLOCK_V != 0:
            next_line = STRIDE_Y - PW * STRIDE_X
            steps += tl.where(x[:, None] + step[None, :] >= PW, next_line, 0)
        pixels = pixel[:, :, None] + steps[None, :, :] + channel * STRIDE_C

    for c in tl.static_range(BLOCK_C):
        if RUN > 0:
            # all known at compile time: which word holds this channel of a step, and which byte
            byte = ((step % RUN) * 3 + c)[None, None, :]
            word = tl.where(byte < 2 * RUN, word_1[:, :, None], word_2[:, :, None])
            word = tl.where(byte < RUN, word_0[:, :, None], word)
            if BLOCK_V > RUN:
                second = tl.where(byte < 2 * RUN, word_4[:, :, None], word_5[:, :, None])
                second = tl.where(byte < RUN, word_3[:, :, None], second)
                word = tl.where((step < RUN)[None, None, :], word, second)
            shift = ((byte % RUN) * 8).to(tl.uint32)
            value = ((word.to(tl.uint32) >> shift) & 255).to(tl.float32)
        else:
            value = tl.load(pixels + c * STRIDE_C, mask=ok[:, :, None], other=0).to(tl.float32)
        if NORMALISE or SCALE != 1.0:
            # less error than x * a + b: the difference is rounded once, whatever cancels
            scale = 1.0 / SCALE
            if NORMALISE:
                scale = 1.0 / (tl.load(std_ptr + c).to(tl.float32) * SCALE)
                value -= tl.load(mean_ptr + c).to(tl.float32) * SCALE
            value *= tl.where(ok, scale, float("nan"))[:, :, None]
        else:
            value = tl.where(ok[:, :, None], value, float("nan"))
        tl.store(out + c * (PH * PW), value.to(out_ptr.dtype.element_ty), mask=mask[:, :, None])

    if K_PADDED > K:
        pad = tl.arange(0, PAD)
        first = mask & (group + channel == 0)[None, :]
        zeros = tl.where(ok, 0.0, float("nan")).to(out_ptr.dtype.element_ty)[:, :, None]
        tl.store(
            out_ptr + (row * K_PADDED + K)[:, :, None] + pad[None, None, :],
            tl.broadcast_to(zeros, (BLOCK_I, BLOCK_L, PAD)),
            mask=first[:, :, None] & (pad < K_PADDED - K)[None, None, :],
        )


# --- launchers -----------------------------------------------------------------------------------


def _patchify_fwd(
    images: Tensor, index: Maybe, mean: Maybe, std: Maybe, ph: int, pw: int, out_dtype: torch.dtype
) -> Tensor:
    """Rows of images (B, C, H, W), which may be a view of packed (B, H, W, C)."""
    if not (images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last)):
        layout = torch.channels_last if images.stride(1) == 1 else torch.contiguous_format
        images = images.contiguous(memory_format=layout)
    sizes = (*images.shape[1:], *images.stride()[1:], ph, pw, images.data_ptr() % 4)
    fixed = _constants(sizes, images.dtype == torch.uint8, out_dtype.itemsize)
    source_rows = images.shape[0] * fixed["N"]
    if index is not None and debugging():
        check_range("index", index, source_rows)
    rows = source_rows if index is None else index.shape[0]
    out = images.new_empty((rows, fixed["K_PADDED"]), dtype=out_dtype)
    if rows:
        lane_groups = fixed["LANE_GROUPS"]
        parts = -(-ph * pw // (fixed["BLOCK_V"] * lane_groups))
        row_programs = -(-rows // (LANES // lane_groups * LANE_ROWS))
        grid = (row_programs, parts, fixed["C"] // fixed["BLOCK_C"])
        run(
            _patchify_fwd_kernel,
            grid,
            images,
            # what there is none of is not looked at
            *(out if t is None else t.contiguous() for t in (index, mean, std)),
            *(out, rows, source_rows),
            HAS_INDEX=index is not None,
            NORMALISE=mean is not None,
            num_warps=LANES // 32,
            **fixed,
        )
    return out


# --- registration --------------------------------------------------------------------------------


def _cpu(
    images: Tensor, index: Maybe, mean: Maybe, std: Maybe, ph: int, pw: int, out_dtype: torch.dtype
) -> Tensor:
    if index is not None:
        patches = (images.shape[2] // ph) * (images.shape[3] // pw)
        check_range("index", index, images.shape[0] * patches)
    return patchify_ref(images, (ph, pw), index, mean, std, out_dtype).contiguous()


def _fake(
    images: Tensor, index: Maybe, mean: Maybe, std: Maybe, ph: int, pw: int, out_dtype: torch.dtype
) -> Tensor:
    batch, channels, height, width = images.shape
    rows = batch * (height // ph) * (width // pw) if index is None else index.shape[0]
    return images.new_empty((rows, _padded(channels * ph * pw)), dtype=out_dtype)


_op = define(
    "patchify(Tensor images, Tensor? index, Tensor? mean, Tensor? std, int ph, int pw, "
    "ScalarType out_dtype) -> Tensor",
    cuda=_patchify_fwd,
    cpu=_cpu,
    fake=_fake,
)


# --- public --------------------------------------------------------------------------------------


def patchify(
    images: Tensor,
    patch_size: int | tuple[int, int],
    index: Tensor | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    layout: str | None = None,
) -> Tensor:
    """Normalises images and cuts them into patch rows (ViT; Dosovitskiy et al. 2021, eq. 1).

    Not differentiable: images that require gradients are refused. Kernels are compiled for each
    image size, and read contiguous images of either layout as they are.

    Args:
        images: (B, C, H, W) or (B, H, W, C), uint8, float32, bfloat16 or float16 (float64 on the
            CPU). H and W are multiples of the patch's.
        patch_size: patch height and width; one number for square patches.
        index: (R,) int32 or int64, the rows wanted, each image * N + patch, where patch = patch row
            * (W / patch width) + patch column; None for all B * N in order.
        mean, std: of each channel, in 0-1 units for uint8; both or neither. Tensors (C,) on the
            images' device; other sequences are copied there on every call, which on CUDA makes the
            host wait.
        out_dtype: of the rows; by default that of float images, float32 for uint8.
        layout: "BCHW" or "BHWC". None takes dimension 1 or 3 for the channels, whichever is at
            most 4; where both or neither are, the layout has to be given.

    Returns:
        (R, K padded with zeros to a multiple of 16), K = C * patch height * patch width in this
        order. uint8 is divided by 255; arithmetic is float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, the layout is ambiguous, or an input
            requires a gradient.
    """
    check_dtype("images", images, also=(torch.uint8,))
    if images.ndim != 4:
        raise ValueError(f"images must have 4 dimensions, got {tuple(images.shape)}")
    ph, pw = sides = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"patch_size must be positive whole numbers, got {patch_size}")
    images = _channels_first(images, layout)
    batch, channels, height, width = images.shape
    if not (channels and height and width) or height % ph or width % pw:
        raise ValueError(
            f"images must have channels, and height and width in multiples of {ph} and {pw}, "
            f"got {channels} channels of {height} x {width}"
        )
    if batch * (height // ph) * (width // pw) >= 2**31 or channels * height * width >= 2**31:
        size = f"{batch} x {channels} x {height} x {width}"
        raise ValueError(f"images must have fewer than 2^31 patches, and elements each, got {size}")
    if index is not None:
        check_index("index", index, images)
        if index.ndim != 1:
            raise ValueError(f"index must have shape (R,), got {tuple(index.shape)}")
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together")
    mean, std = _per_channel("mean", mean, images), _per_channel("std", std, images)
    for name, value in (("images", images), ("mean", mean), ("std", std)):
        if value is not None and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient: patchify has none, detach it")
    if out_dtype is None:
        out_dtype = images.dtype if images.is_floating_point() else torch.float32
    check_dtype("out_dtype", images, dtype=out_dtype)
    return _op(images, index, mean, std, ph, pw, out_dtype)


def _channels_first(images: Tensor, layout: str | None) -> Tensor:
    """A view (B, C, H, W)."""
    if layout is None:
        first, last = images.shape[1] <= 4, images.shape[3] <= 4
        if first == last:
            which = "both" if first else "neither"
            raise ValueError(
                f"layout must be given for images of shape {tuple(images.shape)}: {which} of "
                "dimensions 1 and 3 could be the channels (at most 4)"
            )
        layout = "BCHW" if first else "BHWC"
    if layout not in {"BCHW", "BHWC"}:
        raise ValueError(f"layout must be 'BCHW', 'BHWC' or None, got {layout!r}")
    return images if layout == "BCHW" else images.permute(0, 3, 1, 2)


def _per_channel(name: str, values: Maybe | Sequence[float], images: Tensor) -> Maybe:
    if values is None:
        return None
    if not isinstance(values, Tensor):
        dtype = torch.promote_types(images.dtype, torch.float32)
        values = torch.tensor(tuple(values), dtype=dtype, device=images.device)
    check_dtype(name, values)
    check_shape(name, values, (images.shape[1],), images)
    return values
