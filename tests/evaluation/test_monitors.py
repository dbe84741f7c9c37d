"""RankMe, LiDAR and cosines against NumPy and SciPy; the warning on runs that collapse or not."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from ijepa_fast.config import MaskConfig, ModelConfig, OptimConfig
from ijepa_fast.evaluation.monitors import (
    collapse_warning,
    feature_std,
    lidar,
    prediction_cosine,
    rankme,
)
from ijepa_fast.masks import sample_masks
from ijepa_fast.model import build_models
from ijepa_fast.reference import ReferenceStep
from ijepa_fast.schedules import StepValues


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entropy_rank(values):
    p = values / values.sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())


# --- RankMe --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(100, 12), (8, 12), (1, 5), (40, 1)])
def test_rankme_equals_numpy(shape):
    features = draw(*shape) * torch.linspace(0.1, 3, shape[1]) + 0.3
    singular = np.linalg.svd(features.double().numpy(), compute_uv=False)
    assert rankme(features) == pytest.approx(entropy_rank(singular), rel=1e-9)


@pytest.mark.parametrize("k", [1, 3, 16])
def test_rankme_of_k_equal_directions_is_k(k):
    orthonormal, _ = np.linalg.qr(draw(16, 16).double().numpy())
    features = torch.from_numpy(orthonormal[:k]).repeat(5, 1)
    # 1e-7 for each of the other directions
    assert rankme(features) == pytest.approx(k, rel=1e-4)
    assert rankme(100 * features) == pytest.approx(rankme(features), rel=1e-9)


def test_rankme_of_the_same_row_is_one_and_of_nothing_zero():
    assert rankme(draw(1, 64).repeat(50, 1)) == pytest.approx(1, abs=2e-4)
    assert rankme(torch.zeros(50, 8)) == 0


# --- LiDAR ---------------------------------------------------------------------------------------


def direct_lidar(features):
    """Scatter matrices by loops, eigenvalues of the generalised problem Sb v = lambda Sw v."""
    images, views, width = features.shape
    centre = features.reshape(-1, width).mean(axis=0)
    between, within = np.zeros((width, width)), np.zeros((width, width))
    for image in features:
        mean = image.mean(axis=0)
        between += np.outer(mean - centre, mean - centre) / images
        for view in image:
            within += np.outer(view - mean, view - mean) / (images * views)
    values = scipy.linalg.eigh(between, within + 1e-4 * np.eye(width), eigvals_only=True)
    return entropy_rank(values.clip(0))


@pytest.mark.parametrize(("images", "views", "width"), [(30, 5, 8), (4, 2, 12), (50, 3, 1)])
def test_lidar_equals_scipy(images, views, width):
    scale = torch.linspace(0.01, 1, width)
    features = draw(images, 1, width) * scale + 0.1 * draw(images, views, width, seed=1) + 2
    # null directions that count here are clipped noise there
    expected = direct_lidar(features.double().numpy())
    assert lidar(features) == pytest.approx(expected, rel=1e-4)


def test_lidar_counts_directions_that_tell_images_apart():
    """Images differ in 3 of 10 directions, equally; views in all of them, equally."""
    images, _ = np.linalg.qr(draw(400, 4).double().numpy() - draw(400, 4).double().numpy().mean(0))
    means = torch.zeros(400, 1, 10, dtype=torch.float64)
    means[:, 0, :3] = 20 * torch.from_numpy(images[:, :3] - images[:, :3].mean(0))
    signs = torch.eye(10, dtype=torch.float64)
    views = torch.cat([signs, -signs])[None]
    assert lidar(means + views) == pytest.approx(3, rel=1e-2)
    # RankMe sees views too
    assert rankme((means + views).flatten(0, 1)) > 6


def test_lidar_forgives_what_changes_between_views():
    """A direction of large variance that is nuisance counts little."""
    features = draw(4000, 1, 4) + 0.1 * draw(4000, 6, 4, seed=1)
    nuisance = features.clone()
    nuisance[..., 0] += 30 * draw(4000, 6, seed=2)
    assert lidar(features) == pytest.approx(4, rel=0.02)
    assert lidar(nuisance) == pytest.approx(3, rel=0.02)


def test_lidar_of_equal_images_is_zero():
    assert lidar(torch.ones(5, 3, 4)) == 0


# --- std and cosines -----------------------------------------------------------------------------


def test_feature_std():
    features = draw(50, 7) * torch.linspace(1, 2, 7) + 100
    expected = np.std(features.double().numpy(), axis=0, ddof=1).mean()
    assert feature_std(features) == pytest.approx(expected, rel=1e-9)
    assert feature_std(torch.full((5, 3), 0.1)) == pytest.approx(0, abs=1e-12)


def test_prediction_cosine_equals_numpy():
    p, t = draw(20, 6) + 0.5, draw(20, 6, seed=1) + 1
    result = prediction_cosine(p, t)

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    a, b = p.double().numpy(), t.double().numpy()
    assert result["prediction_cosine"] == pytest.approx(
        np.mean([cosine(*r) for r in zip(a, b, strict=True)])
    )
    assert result["mean_target_cosine"] == pytest.approx(
        np.mean([cosine(b.mean(axis=0), y) for y in b])
    )
    other = [cosine(a[i], b[(i + 10) % 20]) for i in range(20)]
    assert result["shuffled_cosine"] == pytest.approx(np.mean(other))


def test_a_constant_prediction_gains_nothing_and_collapse_is_seen():
    target = draw(40, 8) + 2
    constant = prediction_cosine(target.mean(0, keepdim=True).expand(40, -1), target)
    assert constant["prediction_cosine"] == pytest.approx(constant["mean_target_cosine"])
    assert constant["prediction_cosine"] == pytest.approx(constant["shuffled_cosine"])
    perfect = prediction_cosine(target, target)
    assert perfect["prediction_cosine"] == pytest.approx(1)
    assert perfect["mean_target_cosine"] < 0.95
    collapsed = 1e-3 * draw(40, 8) + 1
    assert prediction_cosine(collapsed, collapsed)["mean_target_cosine"] > 0.999


# --- the warning ---------------------------------------------------------------------------------


def photographs(count, seed):
    """Coarse coloured noise, 32 x 32."""
    coarse = 128 + 50 * draw(count, 3, 4, 4, seed=seed) + 40 * draw(count, 3, 1, 1, seed=seed + 1)
    fine = F.interpolate(coarse, size=(32, 32), mode="bilinear") + 10 * draw(count, 3, 32, 32)
    return fine.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def monitors(step, images):
    with torch.no_grad():
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        rows = step.target_encoder(x).flatten(0, 1)
    return {"feature_std": feature_std(rows), "rankme": rankme(rows)}


def train(seed, lr, momentum, steps=100):
    """A small network for so many steps: monitors before and after."""
    model = ModelConfig(
        name="vit_tiny", patch_size=8, width=96, depth=2, predictor_width=48, predictor_depth=1
    )
    masks = MaskConfig(min_keep=1, truncation_group=16)
    networks = build_models(model, (32, 32), torch.Generator().manual_seed(seed))
    optim = OptimConfig(precision="float32")
    step = ReferenceStep(*networks, optim, mean=(0.5,) * 3, std=(0.5,) * 3)
    images, before = photographs(64, seed), None
    for number in range(steps):
        if before is None:
            before = monitors(step, images)
        part = sample_masks(masks, grid=(4, 4), seed=seed, step=number, positions=np.arange(16))
        chosen = images[16 * (number % 4) :][:16]
        step.accumulate(chosen, part, part.target_index.numel() * 96)
        rate = lr * min(1, (number + 1) / 20) * (1 + math.cos(math.pi * number / steps)) / 2
        step.update(StepValues(lr=rate, weight_decay=0.04, momentum=momentum))
    return before, monitors(step, images)


def test_healthy_training_gives_no_warning():
    before, after = train(2, lr=5e-4, momentum=0.996)
    assert collapse_warning(before, before) is None
    assert collapse_warning(after, before) is None


def test_training_without_the_moving_average_collapses_and_says_so():
    """One seed: some of so small a network leave the collapse again."""
    before, after = train(2, lr=1e-2, momentum=0.0)
    text = collapse_warning(after, before)
    assert text is not None
    assert f"from {before['feature_std']:.3f} (at step 0) to" in text
    assert f"RankMe from {before['rankme']:.1f} to {after['rankme']:.1f}" in text
    assert "optim.momentum" in text


@pytest.mark.parametrize(
    ("before", "after", "collapsed"),
    [
        # (feature std, RankMe) of runs of `ijepa_fast.train`, see `collapse_warning`
        ((0.600, 36.57), (0.627, 36.07), False),
        ((0.587, 36.31), (0.608, 36.59), False),
        ((0.617, 37.07), (0.636, 36.07), False),
        ((0.603, 38.07), (0.600, 25.38), False),
        ((0.480, 18.30), (0.333, 11.70), False),
        ((0.600, 36.57), (0.083, 2.42), True),
        ((0.587, 36.31), (0.029, 1.62), True),
        ((0.617, 37.07), (0.137, 2.72), True),
        ((0.600, 36.57), (0.067, 4.88), True),
        ((0.600, 36.57), (0.740, 10.06), True),
    ],
)
def test_measured_runs(before, after, collapsed):
    first, last = (dict(zip(("feature_std", "rankme"), x, strict=True)) for x in (before, after))
    assert (collapse_warning(last, first) is not None) == collapsed


def test_either_sign_is_enough_and_named():
    first = {"feature_std": 0.6, "rankme": 30.0}
    assert collapse_warning({"feature_std": 0.19, "rankme": 9.1}, first) is None
    flat = collapse_warning({"feature_std": 0.17, "rankme": 30.0}, first)
    assert "the same features" in str(flat)
    narrow = collapse_warning({"feature_std": 0.9, "rankme": 8.9}, first)
    assert "a few directions only" in str(narrow)


@pytest.mark.parametrize("monitor", [rankme, feature_std, lambda x: prediction_cosine(x, x)])
def test_what_is_not_finite_is_an_error(monitor):
    with pytest.raises(ValueError, match="finite, got 1 values that are not"):
        monitor(torch.tensor([[1.0, torch.nan], [1.0, 2.0]]))
