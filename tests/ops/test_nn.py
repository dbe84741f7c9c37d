"""AddLayerNorm and LatentLoss in the place of torch's own modules, in every lane."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_kernels.nn import AddLayerNorm, LatentLoss
from ijepa_kernels.testing import assert_not_worse


@pytest.fixture
def tensors(device):
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn((6, 40), generator=generator).to(device).requires_grad_()
    target = torch.randn((9, 40), generator=generator).to(device) * 3 + 1
    return prediction, target, torch.tensor([8, 0, 3, 3, 2, 7], device=device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_equals_gather_norm_and_torch_loss(reduction, beta, tensors):
    prediction, target, index = tensors
    rows = F.layer_norm(target[index], (40,))
    losses = (
        LatentLoss(reduction, beta)(prediction, target, index),
        nn.SmoothL1Loss(reduction=reduction, beta=beta)(prediction, rows),
    )
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    grads = [torch.autograd.grad(loss, prediction)[0] for loss in losses]
    exact = prediction.detach().double().requires_grad_()
    rows = F.layer_norm(target.double()[index], (40,))
    F.smooth_l1_loss(exact, rows, reduction=reduction, beta=beta).backward()
    assert_not_worse("gradient", grads[0], grads[1], exact.grad)


def test_without_index_and_norm_it_is_smooth_l1(tensors):
    prediction, target, _ = tensors
    target = target[:6].view(2, 3, 40)
    prediction = prediction.view(2, 3, 40)
    loss = LatentLoss(normalize=False)(prediction, target)
    torch.testing.assert_close(loss, nn.SmoothL1Loss()(prediction, target), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"target must have the input's shape \(6, 40\) without"):
        LatentLoss()(prediction.view(6, 40), target)


def test_weight_count_and_eps_are_passed_on(tensors):
    prediction, target, index = tensors
    weight = torch.tensor([1.0, 0, 2, 1, 1, 0.5], device=target.device)
    loss = LatentLoss("sum", eps=0.1)(prediction, target, index, weight=weight, count=7)
    rows = F.layer_norm(target[index], (40,), eps=0.1)
    each = F.smooth_l1_loss(prediction, rows, reduction="none")
    torch.testing.assert_close(loss, (each * weight[:, None]).sum() / 7, rtol=1e-6, atol=0)


def test_is_a_torch_loss_without_state():
    module = LatentLoss(beta=0.5)
    assert isinstance(module, nn.SmoothL1Loss)
    assert module.beta == 0.5
    assert not module.state_dict()
    module.load_state_dict(nn.SmoothL1Loss().state_dict())
    with pytest.raises(ValueError, match="reduction must be mean or sum, got 'none'"):
        LatentLoss("none")


def test_add_layer_norm_is_an_addition_and_a_norm(device):
    torch.manual_seed(0)
    plain = nn.LayerNorm(48, eps=1e-6).to(device)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    ours = AddLayerNorm(48, eps=1e-6).to(device)
    ours.load_state_dict(plain.state_dict())
    assert ours.state_dict().keys() == plain.state_dict().keys()
    residual, x = torch.randn(2, 3, 7, 48, device=device)
    summed, normed = ours(residual, x)
    assert torch.equal(summed, residual + x)
    torch.testing.assert_close(normed, plain(residual + x), rtol=1e-5, atol=1e-6)
    (normed * x).sum().backward()
    (plain(residual + x) * x).sum().backward()
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalized_shape": (3, 4)}, r"normalized_shape must be one dimension, got \(3, 4\)"),
        ({"normalized_shape": 4, "bias": False}, "bias must be True, got True and False"),
        ({"normalized_shape": 4, "elementwise_affine": False}, "must be True, got False and True"),
    ],
)
def test_add_layer_norm_is_checked(options, message):
    with pytest.raises(ValueError, match=message):
        AddLayerNorm(**options)
