"""Conditions against a plain recomputation; diffusion against its formulas; a decoder that has to
paint what it is told; files and refusals.
"""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ijepa_fast.errors import UsageError
from ijepa_fast.masks import sample_masks
from ijepa_fast.reference import normalise
from ijepa_fast.visualize import inputs
from ijepa_fast.visualize.decoder import conditions as module
from ijepa_fast.visualize.decoder import decoder, diffusion, predictor
from ijepa_fast.visualize.decoder.conditions import Conditions, block_pixels, block_side, paste
from ijepa_fast.visualize.decoder.decoder import Budget, load_decoder, save_decoder, train_decoder
from tests.trainer import tiny


@pytest.fixture(scope="module")
def networks(run):
    return inputs.load_networks(run)


@pytest.fixture(scope="module")
def images(split, networks):
    part = inputs.open_parts(str(split), networks.config.data)[0]
    return inputs.load_pictures(part, 7).images


# --- conditions ----------------------------------------------------------------------------------


def test_networks_are_the_context_encoder_and_the_predictor(run, networks):
    state = tiny.final_state(run)
    for network, prefix in ((networks.encoder, "encoder."), (networks.predictor, "predictor.")):
        weights = network.state_dict()
        assert weights.keys() == {k.removeprefix(prefix) for k in state if k.startswith(prefix)}
        assert all(torch.equal(value, state[prefix + key]) for key, value in weights.items())
    assert networks.step == 4


@torch.no_grad()
def test_conditions_against_one_sequence_at_a_time(networks, images, monkeypatch):
    """No padding, no batch: each block of each image by itself."""
    monkeypatch.setattr(module, "BATCH", 3)
    config = networks.config
    found = module.conditions(networks, images, side=8, passes=2, first_step=11)
    blocks = config.masks.num_targets
    assert len(found) == 2 * 7 * blocks
    whole = replace(config.masks, truncation_group=1)
    mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
    step, number = 11, 0
    for _ in range(2):
        for start in (0, 3, 6):
            positions = np.arange(start, min(start + 3, 7))
            masks = sample_masks(
                whole, grid=(4, 4), seed=config.seed, step=step, positions=positions
            )
            step += 1
            for row, position in enumerate(positions):
                tokens = networks.encoder.embed(normalise(images[position][None], mean, std))
                ends = masks.context_cu[row : row + 2]
                context = masks.context_index[ends[0] : ends[1]].long() - 16 * row
                z = networks.encoder.encode(tokens[:, context])
                for block in range(blocks):
                    target = masks.target_index[row, block].long()
                    y = networks.predictor(z, context[None], target[None])
                    torch.testing.assert_close(found.pooled[number], y[0].mean(dim=0))
                    assert found.image[number] == position
                    assert found.context[number].nonzero().flatten().tolist() == context.tolist()
                    top, left, height, width = found.box[number].tolist()
                    covered = [
                        4 * y + x
                        for y in range(top, top + height)
                        for x in range(left, left + width)
                    ]
                    assert covered == target.tolist()
                    number += 1


def test_some_blocks_of_images_of_the_crops_size(networks, images):
    every = module.conditions(networks, images, side=8, first_step=2)
    some = module.conditions(networks, images, side=8, first_step=2, blocks=[2, 0])
    for name in ("pooled", "box", "pixels"):
        values = getattr(every, name).view(7, networks.config.masks.num_targets, -1)[:, [2, 0]]
        assert torch.equal(getattr(some, name).view(7, 2, -1), values)
    with pytest.raises(ValueError, match=r"training crop's size \(32, 32\), got \(16, 32\)"):
        module.conditions(networks, images[:, :16], side=8)


def test_conditions_hold_the_blocks_own_pixels(networks, images):
    found = module.conditions(networks, images, side=16, first_step=1)
    own = block_pixels(images[found.image], found.box * 8, 16)
    assert torch.equal(found.pixels, own)
    # target blocks of 2 to 3 patches of 8 pixels
    assert block_side(networks.config) in (8, 12, 16)


def test_blocks_are_cut_out_and_pasted_back(images):
    box = torch.tensor([[8, 16, 16, 16], [0, 0, 8, 24]] + [[8, 8, 16, 16]] * 5)
    crops = block_pixels(images, box, 16)
    assert torch.equal(crops[0], images[0, 8:24, 16:32])
    strip = images[1, :8, :24].float().mean(dim=(0, 1))
    assert abs(crops[1].float().mean(dim=(0, 1)) - strip).max() < 4
    painted = torch.full_like(crops, 77)
    pasted = paste(images, box, painted)
    for row, (top, left, height, width) in enumerate(box.tolist()):
        inside = torch.zeros(32, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert (pasted[row][inside] == 77).all()
        assert torch.equal(pasted[row][~inside], images[row][~inside])
    assert torch.equal(paste(images, box, crops)[0], images[0])


# --- diffusion -----------------------------------------------------------------------------------


def test_noise_has_the_statistics_of_its_time():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.full((4, 3, 64, 64), 0.5)
    noise = torch.randn(x0.shape, generator=generator)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x = diffusion.add_noise(x0, noise, t)
    assert torch.equal(x[0], x0[0])
    for row, time in enumerate(t.tolist()):
        share = math.cos(math.pi * time / 2)
        assert x[row].mean() == pytest.approx(0.5 * share, abs=0.03)
        assert x[row].std() == pytest.approx(math.sqrt(1 - share**2), rel=0.03, abs=1e-6)
    v = diffusion.velocity(x0, noise, t)
    # both come back from x and v
    a, s = diffusion.noise_levels(t)
    torch.testing.assert_close(a * x - s * v, x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(s * x + a * v, noise, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 7])
def test_ddim_with_a_perfect_denoiser_returns_the_picture(steps):
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand((2, 3, 8, 8), generator=generator) * 2 - 1
    times = []

    def perfect(x, t):
        times.append(float(t[0]))
        a, s = diffusion.noise_levels(t)
        return diffusion.velocity(x0, (x - a * x0) / s, t)

    noise = torch.randn(x0.shape, generator=generator)
    result = diffusion.ddim(perfect, noise, steps=steps)
    torch.testing.assert_close(result, x0, atol=1e-5, rtol=0)
    assert times == pytest.approx([1 - n / steps for n in range(steps)])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        diffusion.ddim(perfect, noise, steps=0)


def test_ddim_of_a_gaussian_gives_that_gaussian():
    """Pictures of normal pixels, std 0.2: E[x0 | x] is known, and so is v."""

    def exact(x, t):
        a, s = diffusion.noise_levels(t)
        x0 = a * 0.04 / (a * a * 0.04 + s * s) * x
        noise = s / (a * a * 0.04 + s * s) * x
        return a * noise - s * x0

    noise = torch.randn((8, 3, 32, 32), generator=torch.Generator().manual_seed(2))
    for steps, tolerance in ((200, 0.004), (30, 0.03)):
        result = diffusion.ddim(exact, noise, steps=steps)
        assert result.std() == pytest.approx(0.2, abs=tolerance)
        assert result.mean() == pytest.approx(0, abs=0.01)


def _told(count, width=6):
    generator = torch.Generator().manual_seed(3)
    return diffusion.Told(
        torch.randn((count, width), generator=generator),
        torch.ones(count, 1),
        torch.rand((count, 4), generator=generator),
    )


def test_each_part_of_the_condition_reaches_the_output():
    generator = torch.Generator().manual_seed(4)
    network = diffusion.Denoiser(side=12, vector=6, width=8)
    network.initialise(generator)
    x = torch.randn((1, 3, 12, 12), generator=generator)
    told, t = _told(1), torch.tensor([0.5])
    # as initialised, the last convolution is zero
    assert not network(x, t, told).any()
    torch.nn.init.normal_(network.leave.weight, generator=generator)
    with torch.no_grad():
        before = network(x, t, told)
        assert before.shape == x.shape
        other = _told(2).rows(slice(1, 2))
        for changed in (
            told._replace(vector=other.vector),
            told._replace(place=other.place),
            told.kept_back(),
        ):
            assert abs(network(x, t, changed) - before).mean() > 1e-3
        assert abs(network(x, torch.tensor([0.4]), told) - before).mean() > 1e-3
        hidden = told.kept_back()
        assert torch.equal(
            network(x, t, hidden), network(x, t, hidden._replace(vector=other.vector))
        )


@pytest.mark.parametrize(
    ("side", "width", "name"), [(10, 8, "side"), (2, 8, "side"), (8, 12, "width")]
)
def test_sizes_that_do_not_work(side, width, name):
    with pytest.raises(ValueError, match=f"{name} must be a multiple of"):
        diffusion.Denoiser(side=side, vector=4, width=width)


# --- training ------------------------------------------------------------------------------------


def _toy(count, seed):
    """The vector says red or blue, the place says dark or bright."""
    generator = torch.Generator().manual_seed(seed)
    red = torch.randint(2, (count,), generator=generator).bool()
    low = torch.randint(2, (count,), generator=generator).bool()
    direction = torch.tensor([3.0, -1.0, 0.5, 2.0])
    pooled = torch.where(red[:, None], direction, -direction) + 100
    pooled += 0.3 * torch.randn((count, 4), generator=generator)
    box = torch.tensor([[0, 1, 2, 2]]).repeat(count, 1)
    box[low, 0] = 2
    level = torch.where(low, 90.0, 220.0)[:, None, None]
    noise = 15 * torch.randn((count, 8, 8), generator=generator)
    pixels = torch.full((count, 8, 8, 3), 10.0)
    bright = (level + noise).clamp(0, 255)
    pixels[red, ..., 0] = bright[red]
    pixels[~red, ..., 2] = bright[~red]
    given = Conditions(
        pooled=pooled,
        box=box,
        pixels=pixels.byte(),
        image=torch.arange(count),
        context=torch.zeros(count, 16, dtype=torch.bool),
        grid=(4, 4),
    )
    return given, red, low


@pytest.fixture(scope="module")
def painter():
    about = {"run": "somewhere", "step": 9, "digest": "abc"}
    given, _, _ = _toy(512, seed=0)
    made = train_decoder(given, Budget(None, 220), about=about, width=16)
    loss = made.about["loss"]
    assert 0 < loss < 1
    assert made.about == {**about, "steps": 220, "loss": loss, "seed": 0, "blocks": 512}
    return made


def test_a_decoder_paints_what_it_is_told(painter):
    given, red, low = _toy(64, seed=1)
    # what it must not look at
    given = replace(given, pixels=torch.zeros_like(given.pixels))
    pixels = painter.sample(given, seed=0, steps=15).float()
    assert pixels.shape == (64, 8, 8, 3)
    mean = pixels.mean(dim=(1, 2))
    assert ((mean[:, 0] > mean[:, 2]) == red).float().mean() > 0.95
    assert ((mean.amax(dim=1) < 155) == low).float().mean() > 0.95
    # colours exchanged with the vectors, noise and places kept
    turned = replace(given, pooled=given.pooled.flip(0))
    mean = painter.sample(turned, seed=0, steps=15).float().mean(dim=(1, 2))
    assert ((mean[:, 0] > mean[:, 2]) == red.flip(0)).float().mean() > 0.95


def test_seeds_and_guidance(painter):
    given, red, _ = _toy(32, seed=2)
    first = painter.sample(given, seed=0, steps=8)
    assert torch.equal(first, painter.sample(given, seed=0, steps=8))
    other = painter.sample(given, seed=1, steps=8)
    assert (first != other).float().mean() > 0.5
    expected = torch.stack([first.float(), other.float()]).std(dim=0).mean(dim=(1, 2, 3))
    torch.testing.assert_close(predictor.spread([first, other]), expected)
    # a row's noise does not depend on how many rows there are
    part = painter.sample(given.rows(torch.arange(5)), seed=0, steps=8)
    assert abs(part.float() - first[:5].float()).max() <= 1
    # without the vector's part nothing of it is left
    turned = replace(given, pooled=given.pooled.flip(0))
    blind = [painter.sample(g, seed=0, steps=8, guidance=0.0) for g in (given, turned)]
    assert torch.equal(*blind)
    strong = painter.sample(given, seed=0, steps=8, guidance=3.0).float().mean(dim=(1, 2))
    assert ((strong[:, 0] > strong[:, 2]) == red).float().mean() > 0.95


def test_training_is_reproducible_and_follows_its_budget():
    given, _, _ = _toy(64, seed=3)
    one, two = (train_decoder(given, Budget(None, 5), about={}, width=8) for _ in range(2))
    weights = [made.denoiser.state_dict() for made in (one, two)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert Budget(None, 10).done(0.0, 5) == 0.5
    assert Budget(1e-9, 10).done(0.0, 0) == 1.0
    # one step even where there is no time
    assert train_decoder(given, Budget(1e-9, None), about={}, width=8).about["steps"] == 1


# --- files ---------------------------------------------------------------------------------------


def test_save_and_load(painter, tmp_path):
    save_decoder(tmp_path / "d", painter)
    assert sorted(p.name for p in (tmp_path / "d").iterdir()) == [
        "decoder.json",
        "decoder.safetensors",
    ]
    loaded = load_decoder(tmp_path / "d")
    assert loaded.about == painter.about
    given, _, _ = _toy(8, seed=4)
    assert torch.equal(
        loaded.sample(given, seed=5, steps=4), painter.sample(given, seed=5, steps=4)
    )
    with pytest.raises(UsageError, match="out must not exist"):
        save_decoder(tmp_path / "d", painter)
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_damaged_decoders(painter, tmp_path):
    save_decoder(tmp_path / "good", painter)
    with pytest.raises(UsageError, match="must be the folder of a decoder"):
        load_decoder(tmp_path)

    def damaged(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        path = tmp_path / "bad" / "decoder.json"
        header = json.loads(path.read_text())
        change(header, tmp_path / "bad" / "decoder.safetensors")
        path.write_text(json.dumps(header))
        with pytest.raises(UsageError, match="decoder") as error:
            load_decoder(tmp_path / "bad")
        return str(error.value)

    def flip(_, weights):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    assert "SHA-256" in damaged(flip)
    assert "damaged" in damaged(lambda _, weights: weights.unlink())
    assert "damaged" in damaged(lambda header, _: header.pop("side"))
    assert "damaged" in damaged(lambda header, _: header.update(vector=5))
    assert "damaged" in damaged(lambda header, _: header.update(width=1 << 20))
    assert "damaged" in damaged(lambda header, _: header.update(side="x"))
    assert "of format" in damaged(lambda header, _: header.update(version=2))


def test_a_decoder_belongs_to_one_checkpoint(networks, tmp_path):
    given, _, _ = _toy(64, seed=5)
    mine = train_decoder(given, Budget(None, 1), about={"digest": networks.digest}, width=8)
    decoder.require_match(mine, networks, tmp_path)
    config = networks.config
    for other in (
        inputs.untrained_networks(config),
        replace(networks, digest="0" * 64),
        inputs._networks(
            networks.encoder,
            networks.predictor,
            replace(config, masks=replace(config.masks, geometry="unbiased")),
            networks.step,
        ),
    ):
        with pytest.raises(UsageError, match="decoder must belong to this checkpoint"):
            decoder.require_match(mine, other, tmp_path)
    # what the predictor's output does not depend on
    same = inputs._networks(
        networks.encoder, networks.predictor, replace(config, out="elsewhere"), networks.step
    )
    decoder.require_match(mine, same, tmp_path)


# --- command line --------------------------------------------------------------------------------


def test_from_run_to_picture(run, split, tmp_path, command):
    folder, out = tmp_path / "decoder", tmp_path / "p.png"
    train = ("train-decoder", run, "--data", split, "--out", folder)
    assert "2 steps, loss" in command(*train, "--steps", "2", "--passes", "1", "--width", "8")
    about = load_decoder(folder).about
    assert (about["step"], about["blocks"], about["data"]) == (4, 32 * 6, str(split))
    assert "out must not exist" in command(*train, code=2)
    draw = ["predictor", run, "--data", split, "--decoder", folder, "--out", out]
    few = ("--images", "2", "--seeds", "2", "--sampling-steps", "2")
    assert "2 blocks" in command(*draw, *few)
    with Image.open(out) as file:
        assert file.format == "PNG"
    assert "out must not exist" in command(*draw, code=2)
    assert "seeds must be at least 1" in command(*draw, "--seeds", "0", "--overwrite", code=2)
    # the same run, trained further
    draw[1] = shutil.copytree(run, tmp_path / "further")
    assert tiny.run(split / "train", draw[1], max_steps=5) == 0
    message = command(*draw, "--overwrite", code=2)
    assert "decoder must belong to this checkpoint (step 5" in message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--minutes", "0"], "minutes must be above 0, got 0"),
        (["--minutes", "nan"], "minutes must be above 0, got nan"),
        (["--width", "12"], "width must be a multiple of 8, got 12"),
        (["--images", "0"], "images must be at least 1, got 0"),
        (["--out", "/no/such/folder"], "out must be in an existing folder"),
    ],
)
def test_train_decoder_refuses(run, tmp_path, command, flags, message):
    argv = ("train-decoder", run, "--data", "none", "--out", tmp_path / "d", *flags)
    assert message in command(*argv, code=2)
    assert not list(tmp_path.iterdir())


def test_the_picture_shows_context_and_completions(networks, images, tmp_path, sheets):
    pictures = inputs.ShownImages(
        images=images[:2], labels=torch.tensor([-1, -1]), classes=(), names=("a", "b")
    )
    given = predictor.held_out(networks, images[:2], side=8)
    again = predictor.held_out(networks, images[:2], side=8, seed=1)
    assert not torch.equal(given.pooled, again.pooled)
    painted = [torch.full((2, 8, 8, 3), value, dtype=torch.uint8) for value in (3, 250)]
    predictor.draw_predictor(
        tmp_path / "p.png", pictures, given, painted, patch_size=8, title="title"
    )
    ((rows, _),) = sheets
    for number, row in enumerate(rows):
        original, context, gap, *completions = row
        assert gap is None
        assert (original.image == images[number].numpy()).all()
        seen = given.context[number].view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
        assert (context.image[seen.numpy()] == original.image[seen.numpy()]).all()
        assert (context.image[~seen.numpy()] == 128).all()
        top, left, height, width = (given.box[number] * 8).tolist()
        block = np.zeros((32, 32), dtype=bool)
        block[top : top + height, left : left + width] = True
        # no pixel of the block is in the context
        assert not (block & seen.numpy()).any()
        for shown, value in zip(completions, (3, 250), strict=True):
            assert (shown.image[block] == value).all()
            assert (shown.image[~block] == original.image[~block]).all()
        for shown in (context, *completions):
            assert shown.frames[0].box == [top, left, height, width]
