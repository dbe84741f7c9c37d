"""Networks: dimensions, names, position table, initial weights, and each layer by its formula."""

import math

import pytest
import torch
from torch import nn

from ijepa_fast.config import ModelConfig
from ijepa_fast.model import (
    Attention,
    Mlp,
    PatchEmbed,
    Predictor,
    VisionTransformer,
    build_models,
    sincos_position_embedding,
)
from tests.trainer import plain_step

SMALL = ModelConfig(
    name="vit_tiny",
    patch_size=8,
    width=48,
    depth=2,
    heads=3,
    predictor_width=24,
    predictor_depth=2,
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random_(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter off its start, so that each one matters."""
    generator = _generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def _weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


# --- sizes and names -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patch", "side", "d", "depth", "heads", "f", "narrow_depth"),
    [
        ("vit_tiny", 16, 224, 192, 12, 3, 768, 6),
        ("vit_small", 16, 224, 384, 12, 6, 1536, 6),
        ("vit_base", 16, 224, 768, 12, 12, 3072, 6),
        ("vit_large", 16, 224, 1024, 24, 16, 4096, 12),
        ("vit_huge", 14, 224, 1280, 32, 16, 5120, 12),
        ("vit_huge", 16, 448, 1280, 32, 16, 5120, 12),
        ("vit_giant", 16, 224, 1408, 40, 16, 6144, 16),
    ],
)
def test_parameter_counts_of_the_named_sizes(name, patch, side, d, depth, heads, f, narrow_depth):
    with torch.device("meta"):
        encoder, predictor = build_models(ModelConfig(name=name, patch_size=patch), (side, side))

    def block(width: int, hidden: int) -> int:
        attention = 3 * width * width + 3 * width + width * width + width
        mlp = width * hidden + hidden + hidden * width + width
        return 4 * width + attention + mlp

    p = 384
    expected = depth * block(d, f) + 3 * patch * patch * d + d + 2 * d
    assert sum(w.numel() for w in encoder.parameters()) == expected
    expected = narrow_depth * block(p, 4 * p) + d * p + p + p * d + d + p + 2 * p
    assert sum(w.numel() for w in predictor.parameters()) == expected
    assert (len(encoder.blocks), len(predictor.predictor_blocks)) == (depth, narrow_depth)
    attentions = [m for n in (encoder, predictor) for m in n.modules() if isinstance(m, Attention)]
    assert {attention.heads for attention in attentions} == {heads}
    assert encoder.grid == (side // patch, side // patch)


def test_well_known_totals():
    # without class token and head, as published for ViT-B/16 and ViT-L/16: 85.6 M and 303 M
    totals = []
    for name in ("vit_base", "vit_large"):
        with torch.device("meta"):
            encoder, _ = build_models(ModelConfig(name=name), (224, 224))
        totals.append(sum(w.numel() for w in encoder.parameters()) / 1e6)
    assert totals == pytest.approx([85.6, 303.1], abs=0.1)


def test_state_dict_names_and_shapes():
    encoder, predictor = build_models(SMALL, (32, 48))

    def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.norm1.weight": (width,),
            f"{name}.norm1.bias": (width,),
            f"{name}.attn.qkv.weight": (3 * width, width),
            f"{name}.attn.qkv.bias": (3 * width,),
            f"{name}.attn.proj.weight": (width, width),
            f"{name}.attn.proj.bias": (width,),
            f"{name}.norm2.weight": (width,),
            f"{name}.norm2.bias": (width,),
            f"{name}.mlp.fc1.weight": (4 * width, width),
            f"{name}.mlp.fc1.bias": (4 * width,),
            f"{name}.mlp.fc2.weight": (width, 4 * width),
            f"{name}.mlp.fc2.bias": (width,),
        }

    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == {
        "pos_embed": (1, 24, 48),
        "patch_embed.proj.weight": (48, 3, 8, 8),
        "patch_embed.proj.bias": (48,),
        **block("blocks.0", 48),
        **block("blocks.1", 48),
        "norm.weight": (48,),
        "norm.bias": (48,),
    }
    assert {k: tuple(v.shape) for k, v in predictor.state_dict().items()} == {
        "predictor_embed.weight": (24, 48),
        "predictor_embed.bias": (24,),
        "mask_token": (1, 1, 24),
        "predictor_pos_embed": (1, 24, 24),
        **block("predictor_blocks.0", 24),
        **block("predictor_blocks.1", 24),
        "predictor_norm.weight": (24,),
        "predictor_norm.bias": (24,),
        "predictor_proj.weight": (48, 24),
        "predictor_proj.bias": (48,),
    }
    trained = {*_weights(encoder), *_weights(predictor)}
    assert not {name for name in trained if "pos_embed" in name}


def test_all_norms_have_the_published_epsilon():
    norms = [
        module
        for network in build_models(SMALL, (32, 32))
        for module in network.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    assert len(norms) == 10
    assert {norm.eps for norm in norms} == {1e-6}


# --- position table ------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2), (1, 7), (14, 14)])
@pytest.mark.parametrize("width", [4, 24, 48])
def test_position_table_equals_a_plain_loop(grid, width):
    table = sincos_position_embedding(width, grid)
    assert table.dtype == torch.float32
    assert table.shape == (1, grid[0] * grid[1], width)
    # rounded once, from float64: at most the last bit may differ
    expected = plain_step.position_table(width, grid)
    torch.testing.assert_close(table[0].double(), expected, rtol=2e-7, atol=1e-15)


def test_first_half_of_the_position_channels_is_the_column():
    table = sincos_position_embedding(8, (2, 3))[0].view(2, 3, 8)
    assert torch.equal(table[0, :, :4], table[1, :, :4])
    assert torch.equal(table[:, 0, 4:], table[:, 2, 4:])
    x, y = 2.0, 1.0
    by_hand = [f(a * w) for a in (x, y) for f in (math.sin, math.cos) for w in (1.0, 0.01)]
    assert table[1, 2].tolist() == pytest.approx(by_hand, abs=1e-7)


def test_position_table_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="width must be a multiple of 4, got 6"):
        sincos_position_embedding(6, (2, 2))


def test_each_network_has_a_table_of_its_own_width():
    encoder, predictor = build_models(SMALL, (32, 48))
    expected = plain_step.position_table(48, (4, 6)).float()
    torch.testing.assert_close(encoder.pos_embed[0], expected, rtol=2e-7, atol=1e-15)
    expected = plain_step.position_table(24, (4, 6)).float()
    torch.testing.assert_close(predictor.predictor_pos_embed[0], expected, rtol=2e-7, atol=1e-15)


# --- initial weights -----------------------------------------------------------------------------


def test_initial_weights_follow_the_published_rule():
    config = ModelConfig(name="vit_tiny", depth=3, predictor_depth=3)
    encoder, predictor = build_models(config, (64, 64), _generator())
    parameters = {**_weights(encoder), **_weights(predictor)}
    for name, parameter in parameters.items():
        if "norm" in name:
            expected = 1.0 if name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            # six standard errors; deeper layers are not scaled down
            count = parameter.numel()
            assert parameter.std().item() == pytest.approx(0.02, rel=6 / math.sqrt(2 * count)), name
            assert abs(parameter.mean().item()) < 6 * 0.02 / math.sqrt(count), name
    assert parameters["mask_token"].unique().numel() == 384
    # normal, not uniform: 4.6 % of a normal sample is further out than two standard deviations
    far = (parameters["blocks.0.mlp.fc1.weight"].abs() > 0.04).float().mean().item()
    assert far == pytest.approx(0.0455, abs=0.005)


def test_initial_weights_are_a_function_of_the_seed():
    def draw(seed: int) -> dict[str, torch.Tensor]:
        encoder, predictor = build_models(SMALL, (32, 32), _generator(seed))
        return {**encoder.state_dict(), **predictor.state_dict()}

    first = draw(1)
    torch.manual_seed(99)
    again, other = draw(1), draw(2)
    assert all(torch.equal(first[k], again[k]) for k in first)
    differing = {k for k in first if not torch.equal(first[k], other[k])}
    assert differing == {
        k for k in first if (k.endswith("weight") and "norm" not in k) or k == "mask_token"
    }
    drawn = [first[k].flatten()[:50] for k in differing if first[k].numel() >= 50]
    assert len({tuple(d.tolist()) for d in drawn}) == len(drawn)


# --- layers --------------------------------------------------------------------------------------


def test_patch_index_is_row_times_columns_plus_column():
    embed = PatchEmbed(4, 1, 2)
    with torch.no_grad():
        embed.proj.weight.zero_()
        embed.proj.weight[0] = 1.0
        # picks one pixel: row 1, column 2 of the patch
        embed.proj.weight[1, 0, 1, 2] = 1.0
        embed.load_state_dict({**embed.state_dict(), "proj.bias": torch.tensor([0.5, 0.0])})
    image = torch.zeros(1, 1, 8, 12)
    image[0, 0, 4:8, 8:12] = 1.0
    image[0, 0, 1, 6] = 7.0
    rows = embed(image)
    assert rows.shape == (1, 6, 2)
    assert rows[0, :, 0].tolist() == [0.5, 7.5, 0.5, 0.5, 0.5, 16.5]
    assert rows[0, :, 1].tolist() == [0.0, 7.0, 0.0, 0.0, 0.0, 1.0]


def test_attention_needs_a_width_that_the_heads_divide():
    with pytest.raises(ValueError, match=r"divisible by the number of heads \(5\), got 12"):
        Attention(12, 5)


def test_mlp_uses_the_exact_gelu():
    mlp = Mlp(1, 1).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.fill_(0.0 if parameter.ndim == 1 else 1.0)
    # x * Phi(x), with Phi from tables
    expected = [-0.158655253931457, 0.0, 0.841344746068543, 1.954499736103642]
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)[:, None, None]
    assert mlp(x).flatten().tolist() == pytest.approx(expected, abs=1e-14)


def test_block_and_encoder_equal_the_plain_formulas():
    encoder = VisionTransformer(
        image_size=(12, 20), patch_size=4, width=12, depth=3, heads=2, mlp_hidden=20
    )
    _random_(encoder).double()
    images = torch.randint(0, 256, (2, 3, 12, 20), generator=_generator(1), dtype=torch.uint8)
    networks = plain_step.PlainNetworks(
        heads=2, patch_size=4, grid=(3, 5), encoder=_weights(encoder), predictor={}
    )
    expected = torch.stack(
        [
            plain_step.encode(plain_step.embed(i, networks.encoder, networks), networks.encoder, 2)
            for i in images
        ]
    )
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (plain_step.MEAN, plain_step.STD))
    normal = (images.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(encoder(normal), expected, rtol=1e-11, atol=1e-11)


def test_predictor_equals_the_plain_formulas():
    predictor = Predictor(grid=(3, 5), encoder_width=10, width=12, depth=2, heads=3, mlp_hidden=48)
    _random_(predictor).double()
    contexts, targets = [[0, 7, 9], [14, 2, 3]], [[5, 6], [0, 1]]
    z = torch.randn(2, 3, 10, generator=_generator(1), dtype=torch.float64)
    actual = predictor(z, torch.tensor(contexts), torch.tensor(targets))
    networks = plain_step.PlainNetworks(
        heads=3, patch_size=4, grid=(3, 5), encoder={}, predictor=_weights(predictor)
    )
    for i in range(2):
        expected = plain_step.predict(z[i], contexts[i], targets[i], networks)
        torch.testing.assert_close(actual[i], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_and_rectangles(channels):
    encoder = VisionTransformer(
        image_size=(16, 40),
        patch_size=8,
        width=16,
        depth=1,
        heads=2,
        mlp_hidden=32,
        in_channels=channels,
    )
    images = torch.randn(2, channels, 16, 40, generator=_generator())
    assert encoder.grid == (2, 5)
    assert encoder(images).shape == (2, 10, 16)
    # every channel counts
    changed = images.clone()
    changed[:, -1] += 1
    assert not torch.allclose(encoder(images), encoder(changed))


@pytest.mark.parametrize("size", [(20, 16), (16, 20)])
def test_the_image_must_hold_whole_patches(size):
    with pytest.raises(ValueError, match=r"image_size must be a multiple of patch_size \(8\)"):
        VisionTransformer(image_size=size, patch_size=8, width=16, depth=1, heads=2, mlp_hidden=32)


# --- padding -------------------------------------------------------------------------------------


def test_padding_between_context_and_targets_does_not_reach_the_prediction():
    predictor = Predictor(grid=(3, 3), encoder_width=8, width=12, depth=2, heads=3, mlp_hidden=24)
    _random_(predictor).double()
    z = torch.randn(1, 4, 8, generator=_generator(1), dtype=torch.float64)
    patches, targets = torch.tensor([[0, 3, 4, 8]]), torch.tensor([[1, 2]])
    expected = predictor(z[:, :3], patches[:, :3], targets)
    z[:, 3] = 1e3
    valid = torch.tensor([[True, True, True, False]])
    padded = predictor(z, patches, targets, valid)
    torch.testing.assert_close(padded, expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(predictor(z, patches, targets), expected)


# --- copies --------------------------------------------------------------------------------------
