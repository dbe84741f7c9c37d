"""PatchConv2d against nn.Conv2d, in every lane."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_kernels.nn import PatchConv2d
from ijepa_kernels.testing import assert_not_worse

# every byte / 255 has to be told from its neighbours
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _conv(device, patch=14, width=24, channels=3, **options):
    torch.manual_seed(0)
    return nn.Conv2d(channels, width, patch, patch, **options).to(device)


def _as_rows(features):
    return features.flatten(2).transpose(1, 2).flatten(0, 1)


def _truth(conv, images, magnitudes=False):
    """The convolution's rows in float64, and its weights there; optionally all without signs."""
    conv, images = copy.deepcopy(conv).double(), images.double()
    if magnitudes:
        images = images.abs()
        for parameter in conv.parameters():
            parameter.data.abs_()
    return _as_rows(conv(images)), list(conv.parameters())


def _plain(conv, images):
    """The same in float32, as a matrix product: cuDNN's convolutions round factors to TF32."""
    patches = F.unfold(images, conv.kernel_size, stride=conv.stride).transpose(1, 2).flatten(0, 1)
    return F.linear(patches, conv.weight.flatten(1), conv.bias), list(conv.parameters())


def _bytes(device, patch=14, channels=3):
    generator = torch.Generator().manual_seed(0)
    shape = (2, 2 * patch, 3 * patch, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize("bias", [True, False])
def test_patch_conv_is_the_convolution(patch, bias, device):
    conv = _conv(device, patch, bias=bias)
    module = PatchConv2d.from_conv(conv)
    images = torch.randn(2, 3, 2 * patch, 3 * patch, device=device)
    assert [id(p) for p in module.parameters()] == [id(p) for p in conv.parameters()]
    index = torch.tensor([7, 0, 7, 11], dtype=torch.int32, device=device)
    grad = torch.randn(12, 24, device=device)

    def results(rows, weights, grad=grad):
        grads = torch.autograd.grad(rows, weights, grad.to(rows.dtype))
        return {"rows": rows, "picked": rows[index.long()], **dict(enumerate(grads))}

    ours = results(module(images), list(conv.parameters()))
    ours["picked"] = module(images, index)
    plain, truth = results(*_plain(conv, images)), results(*_truth(conv, images))
    rows, weights = _truth(conv, images, magnitudes=True)
    terms = results(rows, weights, grad.abs())
    for name, value in ours.items():
        assert_not_worse(str(name), value, plain[name], truth[name], terms=terms[name])


@pytest.mark.parametrize("layout", ["BHWC", "BCHW"])
def test_patch_conv_takes_bytes(layout, device):
    conv = _conv(device)
    images = _bytes(device)
    mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
    numbers = images.movedim(3, 1).double() / 255
    floats = (numbers - mean[:, None, None]) / std[:, None, None]
    magnitudes = (numbers + mean[:, None, None]) / std[:, None, None]
    given = images if layout == "BHWC" else images.movedim(3, 1).contiguous()
    ours = PatchConv2d.from_conv(conv)(given, mean=mean, std=std)
    plain, truth = _plain(conv, floats.float())[0], _truth(conv, floats)[0]
    terms = _truth(conv, magnitudes, magnitudes=True)[0]
    assert_not_worse("rows", ours, plain, truth, terms=terms)


def test_patch_conv_state_dict(device):
    conv = _conv(device)
    module = PatchConv2d(3, 24, 14, stride=14, device=device)
    module.load_state_dict(conv.state_dict())
    assert list(module.state_dict()) == list(conv.state_dict())
    images = _bytes(device)
    assert torch.equal(module(images), PatchConv2d.from_conv(conv)(images))
    assert not PatchConv2d.from_conv(conv.eval()).training


def test_patch_conv_under_autocast(device):
    module = PatchConv2d.from_conv(_conv(device))
    images = _bytes(device)
    with torch.autocast(device.type, torch.bfloat16):
        half = module(images, mean=MEAN, std=STD)
    assert half.dtype == torch.bfloat16
    full = module(images, mean=MEAN, std=STD)
    assert full.dtype == torch.float32
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
    (grad,) = torch.autograd.grad(half.sum(), module.weight)
    assert grad.dtype == torch.float32
    assert module.bfloat16()(images).dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
def test_patch_conv_compiles_whole(autocast, device):
    module = PatchConv2d.from_conv(_conv(device))
    images, index = _bytes(device), torch.tensor([3, 1], device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        eager = module(images, index, mean=MEAN, std=STD)
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        graph = compiled(images, index, mean=MEAN, std=STD)
    assert torch.equal(eager, graph)
    weights = (module.weight, module.bias)
    grads = (torch.autograd.grad(y.float().square().sum(), weights) for y in (eager, graph))
    for actual, expected in zip(*grads, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 8}, r"stride must be \(4, 4\) in a patch embedding, got \(8, 8\)"),
        ({"padding": 1}, r"padding must be \(0, 0\) in a patch embedding, got \(1, 1\)"),
        ({"dilation": 2}, r"dilation must be \(1, 1\) in a patch embedding, got \(2, 2\)"),
        ({"groups": 2}, "groups must be 1 in a patch embedding, got 2"),
    ],
)
def test_patch_conv_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PatchConv2d(4, 8, 4, **options)
    with pytest.raises(ValueError, match=message):
        PatchConv2d.from_conv(nn.Conv2d(4, 8, 4, **{"stride": 4} | options))
    assert PatchConv2d(4, 8, (4, 2), padding="valid").stride == (4, 2)


def test_patch_conv_images_are_checked(device):
    module = PatchConv2d(8, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"images must have 8 channels in layout BCHW or BHWC"):
        module(torch.zeros(1, 3, 4, 4, device=device))
    with pytest.raises(ValueError, match=r"images must have 8 channels in layout BHWC, got"):
        module(torch.zeros(1, 8, 4, 4, device=device), layout="BHWC")
    square = torch.zeros(1, 8, 8, 8, device=device)
    with pytest.raises(ValueError, match="layout must be given for images of shape"):
        module(square)
    assert module(square, layout="BCHW").shape == (4, 4)
    with pytest.raises(ValueError, match="layout must be 'BCHW', 'BHWC' or None, got 'CHW'"):
        module(square, layout="CHW")
    with pytest.raises(ValueError, match="images must have 4 dimensions"):
        module(square[0])
    with pytest.raises(ValueError, match="images must not require a gradient"):
        module(square.requires_grad_(), layout="BCHW")
