"""Fine-tuning against a plain loop; which parameter learns how fast; what can be learned."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ijepa_fast.evaluation.finetune import FinetuneSettings, finetune
from ijepa_fast.keyed_random import Stream, torch_generator
from ijepa_fast.model import VisionTransformer, initialise
from ijepa_fast.weights import Encoder

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def encoder():
    network = VisionTransformer(
        image_size=(16, 16), patch_size=8, width=16, depth=2, heads=2, mlp_hidden=24
    )
    initialise(network, torch.Generator().manual_seed(0))
    return Encoder(network, patch_size=8, mean=MEAN, std=STD)


def images(count, seed=0, classes=3):
    """Noise about a colour; the class is the colour."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    colours = torch.tensor([[150, 110, 110], [110, 150, 110], [110, 110, 150]])
    noise = 60 * torch.randn(count, 16, 16, 3, generator=generator)
    pixels = (colours[labels][:, None, None] + noise).clamp(0, 255)
    return pixels.to(torch.uint8), labels


def batches(pixels, labels, size=12):
    def epoch(number):
        order = np.random.default_rng(number).permutation(len(pixels))
        for start in range(0, len(pixels), size):
            rows = torch.from_numpy(order[start : start + size])
            yield pixels[rows], labels[rows]

    return epoch


TRAIN, TEST = images(36), images(60, seed=1)


def tune(given=None, train=TRAIN, test=TEST, *, seed=0, half=False, progress=None, **settings):
    """12 images a step."""
    return finetune(
        given or encoder(),
        3,
        batches(*train),
        batches(*test)(0),
        FinetuneSettings(**{"epochs": 2, **settings}),
        steps_per_epoch=len(train[0]) // 12,
        seed=seed,
        half=half,
        progress=progress,
    )


# written out by hand for two blocks: 0.75 ** (3 - layer)
BLOCK = [
    *("norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight"),
    *("attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias"),
    *("mlp.fc2.weight", "mlp.fc2.bias"),
]
SCALES = {
    "encoder.patch_embed.proj.weight": 0.421875,
    "encoder.patch_embed.proj.bias": 0.421875,
    **{f"encoder.blocks.0.{name}": 0.5625 for name in BLOCK},
    **{f"encoder.blocks.1.{name}": 0.75 for name in BLOCK},
    "encoder.norm.weight": 1.0,
    "encoder.norm.bias": 1.0,
    "head.weight": 1.0,
    "head.bias": 1.0,
}
DECAYED = ("proj.weight", "qkv.weight", "fc1.weight", "fc2.weight", "head.weight")


def test_equals_a_plain_loop():
    """One AdamW a parameter, its rate, the schedule and smoothing written out."""
    start = encoder()
    result = tune(start, lr=3e-3, epochs=10, seed=4)

    network = copy.deepcopy(start.network)
    head = nn.Linear(16, 3)
    nn.init.normal_(head.weight, std=0.01, generator=torch_generator(4, Stream.INIT))
    nn.init.zeros_(head.bias)
    named = {f"encoder.{n}": p for n, p in network.named_parameters()}
    named |= {f"head.{n}": p for n, p in head.named_parameters()}
    assert named.keys() == SCALES.keys()
    optimizers = {
        name: torch.optim.AdamW([p], weight_decay=0.05 if name.endswith(DECAYED) else 0.0)
        for name, p in named.items()
    }
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    losses = []
    for epoch in range(10):
        total = 0.0
        for number, (pixels, labels) in enumerate(batches(*TRAIN)(epoch)):
            # of 30 steps three are the warm-up
            step = 3 * epoch + number + 1
            if step < 3:
                rate = 3e-3 * step / 3
            else:
                rate = 1e-6 + (3e-3 - 1e-6) * (1 + math.cos(math.pi * (step - 3) / 27)) / 2
            x = ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            log_p = head(network(x).mean(dim=1)).log_softmax(dim=1)
            wanted = 0.9 * F.one_hot(labels, 3) + 0.1 / 3
            loss = -(wanted * log_p).sum(dim=1).mean()
            total += loss.item() / 3
            for name, optimizer in optimizers.items():
                optimizer.zero_grad()
                optimizer.param_groups[0]["lr"] = rate * SCALES[name]
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
        losses.append(total)
    assert result.losses == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0]
    ours = dict(result.classifier.named_parameters())
    for name, value in named.items():
        if name.endswith("qkv.bias"):
            # keys: their true gradient is zero, what Adam makes of its rounding is noise
            q, _, v = range(3)
            torch.testing.assert_close(
                ours[name].view(3, -1)[[q, v]], value.view(3, -1)[[q, v]], rtol=1e-4, atol=1e-5
            )
        else:
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        x = ((TEST[0].float() / 255 - mean) / std).permute(0, 3, 1, 2)
        right = head(network(x).mean(dim=1)).argmax(dim=1) == TEST[1]
    assert result.accuracy == pytest.approx(right.float().mean().item(), abs=1 / 60 + 1e-6)
    assert result.steps == 30


def test_the_given_encoder_is_not_changed():
    given = encoder().requires_grad_(False)
    network, before = given.network, copy.deepcopy(given.network.state_dict())
    result = tune(given, lr=1e-2)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(p.requires_grad for p in network.parameters())
    tuned = result.classifier.encoder.state_dict()
    moved = {name for name in before if not torch.equal(tuned[name], before[name])}
    assert moved == {name for name in before if name != "pos_embed"}


def test_layer_decay_zero_trains_the_last_layer_alone():
    given = encoder()
    classifier = tune(given, lr=1e-2, layer_decay=0.0).classifier
    for name, value in given.network.state_dict().items():
        same = torch.equal(classifier.encoder.state_dict()[name], value)
        assert same == (not name.startswith("norm.")), name
    assert classifier.head.bias.abs().min() > 0


def test_learns_what_can_be_learned_and_nothing_else():
    settings = {"epochs": 12, "lr": 1e-2}
    train, test = images(60), images(90, seed=1)
    assert tune(train=train, test=test, **settings).accuracy > 0.9
    shuffled = train[1][torch.randperm(60, generator=torch.Generator().manual_seed(3))]
    # chance is 0.33 with a standard error of 0.05
    assert tune(train=(train[0], shuffled), test=test, **settings).accuracy < 0.6


def test_seed_is_that_of_the_head():
    """Which a learning rate of 0 leaves as it was drawn."""
    one, same, other = (tune(seed=s, lr=0.0).classifier.head.weight for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert 0.005 < one.std() < 0.015


def test_bfloat16_is_near_float32():
    plain, half = tune(lr=1e-3), tune(lr=1e-3, half=True)
    assert half.losses == pytest.approx(plain.losses, rel=0.02)
    assert half.losses != plain.losses
    assert all(p.dtype == torch.float32 for p in half.classifier.parameters())


def test_test_labels_outside_are_wrong_and_progress_is_told():
    lines: list[str] = []
    pixels, labels = TEST
    result = tune(test=(pixels, labels + 10), progress=lines.append)
    assert result.accuracy == 0
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert lines[0].endswith("36 images")
    assert f"loss {result.losses[0]:.4f}" in lines[0]


def test_a_loss_that_is_not_finite():
    given = encoder()
    with torch.no_grad():
        given.network.norm.bias[0] = math.inf
    with pytest.raises(FloatingPointError, match=r"finite, got nan in epoch 1, batch 1: lower"):
        tune(given)
