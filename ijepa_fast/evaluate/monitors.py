"""Numbers about representations that need no labels, and a warning where they have collapsed.

Pure functions of tensors, computed in float64. Letters: n rows, D feature width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "PredictionCosine",
    "collapse_warning",
    "feature_std",
    "lidar",
    "prediction_cosine",
    "rankme",
]

EPSILON = 1e-7
WITHIN_DELTA = 1e-4
# of the untrained network's; see `collapse_warning` for what was measured
COLLAPSED_SHARE = 0.3


def rankme(features: Tensor) -> float:
    """RankMe: how many directions the features use, a soft rank (Garrido et al., "RankMe: Assessing
    the downstream performance of pretrained self-supervised representations by their rank", ICML
    2023, equations 1 and 2).

    exp of the entropy of p_k = sigma_k / sum(sigma) + 1e-7, sigma the singular values. The mean is
    not taken off, so a large common direction counts as one and makes the others small.

    Args:
        features: (n, D), finite; the paper takes 25,600 rows, and no fewer than D are of use.

    Returns:
        1 (all rows on one line) to about min(n, D); 0 where all features are 0.

    Raises:
        ValueError: wrong shape or dtype, or a value that is not finite.
    """
    _check("features", features, 2)
    singular = torch.linalg.svdvals(features.double())
    return _soft_rank(singular)


def lidar(features: Tensor) -> float:
    """LiDAR: the soft rank of what tells images apart, beyond what changes between views of one
    (Thilak et al., "LiDAR: Sensing Linear Probing Performance in Joint Embedding SSL
    Architectures", ICLR 2024, section 4).

    Linear discriminant analysis with every image a class and its views (crops, or contexts of
    different masks) the samples: Sb the covariance of the images' means, Sw the mean covariance of
    the views about them, plus 1e-4 on the diagonal. The eigenvalues of Sw^-1/2 Sb Sw^-1/2 take the
    place of RankMe's singular values.

    Args:
        features: (images, views, D), finite, at least 2 images and 2 views; the paper takes 1,000
            and, for I-JEPA, 50. The rank cannot exceed images - 1.

    Returns:
        1 to about min(images - 1, D); 0 where all images have the same mean.

    Raises:
        ValueError: wrong shape or dtype, or a value that is not finite.
    """
    _check("features", features, 3)
    if min(features.shape[:2]) < 2:
        raise ValueError(
            f"features must hold at least 2 images and 2 views, got {tuple(features.shape)}"
        )
    x = features.double()
    means = x.mean(dim=1)
    between = means - means.mean(dim=0)
    within = (x - means[:, None]).flatten(0, 1)
    values, vectors = torch.linalg.eigh(within.T @ within / len(within))
    # singular values of Sb^1/2 Sw^-1/2, squared: no tiny negative eigenvalues
    whitened = between @ vectors * (values.clamp_min(0) + WITHIN_DELTA).rsqrt()
    return _soft_rank(torch.linalg.svdvals(whitened / math.sqrt(len(means))).square())


def feature_std(features: Tensor) -> float:
    """Standard deviation over rows (n - 1 in the denominator), mean over channels.

    Args:
        features: (n, D), finite, at least 2 rows.

    Raises:
        ValueError: wrong shape or dtype, or a value that is not finite.
    """
    _check("features", features, 2)
    if len(features) < 2:
        raise ValueError(f"features must hold at least 2 rows, got {len(features)}")
    return features.double().std(dim=0).mean().item()


def _soft_rank(values: Tensor) -> float:
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total + EPSILON
    return math.exp(-(share * share.log()).sum().item())


def _check(name: str, features: Tensor, dimensions: int) -> None:
    if features.ndim != dimensions or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"{name} must be a float tensor of {dimensions} dimensions, none of them 0, "
            f"got {features.dtype} {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError(
            f"{name} must be finite, got {int((~features.isfinite()).sum())} values that are not"
        )


@dataclass(frozen=True, kw_only=True)
class PredictionCosine:
    """How far predictions point where their targets do.

    Attributes:
        cosine: mean cosine between a prediction and its target.
        mean_target: mean cosine between the mean of all targets and a target: what a constant gets.
        shuffled: mean cosine between a prediction and another row's target.
    """

    cosine: float
    mean_target: float
    shuffled: float


def prediction_cosine(prediction: Tensor, target: Tensor) -> PredictionCosine:
    """Cosine between predicted and target features, beside what a constant prediction gets.

    Targets share a common direction: a cosine of 0.8 may be that alone. Only what lies above
    `mean_target` was predicted. Where `mean_target` is itself near 1, all targets are the same.

    Args:
        prediction, target: (n, D), finite, at least 2 rows, row by row; a row of zeros has cosine
            0. For `shuffled` a row meets the target half of the rows further on, which is of
            another image where rows are sorted by image.

    Raises:
        ValueError: wrong shapes or dtype, or a value that is not finite.
    """
    _check("prediction", prediction, 2)
    _check("target", target, 2)
    if prediction.shape != target.shape or len(target) < 2:
        raise ValueError(
            "prediction and target must have the same shape and at least 2 rows, "
            f"got {tuple(prediction.shape)} and {tuple(target.shape)}"
        )
    p, t = prediction.double(), target.double()
    return PredictionCosine(
        cosine=F.cosine_similarity(p, t).mean().item(),
        mean_target=F.cosine_similarity(t.mean(dim=0, keepdim=True), t).mean().item(),
        shuffled=F.cosine_similarity(p, t.roll(len(t) // 2, dims=0)).mean().item(),
    )


def collapse_warning(monitors: Mapping[str, float], baseline: Mapping[str, float]) -> str | None:
    """A warning in words where features have collapsed, else None.

    Both mappings hold `feature_std` and `rankme` of the target encoder's patch features, one row a
    patch, of the same images; `baseline` is of the untrained network. The warning is given where
    either has fallen below 0.3 of it.

    Measured on 256 rendered images (RankMe on every fourth of 16,384 rows), 3 x 192 ViT,
    predictor 96 x 2, batch 64, 150 steps, float32, a checkpoint every 25 steps; untrained: feature
    std 0.59 to 0.62, RankMe 36 to 37. Shares of that:

    - the demo's rates (lr 5e-4, momentum 0.996), 3 seeds: std 0.98 to 1.04, RankMe 0.97 to 1.03;
    - lr 1e-2 and momentum 0 (target = context), 3 seeds: RankMe 0.16, 0.05, 0.05 at step 25 and
      0.07, 0.04, 0.07 at the end; std 0.45, 0.06, 0.05 and 0.14, 0.05, 0.22;
    - lr 5e-4 and momentum 0: RankMe 0.35 at step 25, 0.13 at the end; std 0.28 and 0.11;
    - lr 1e-2 and momentum 0.996: std grows to 1.23, RankMe falls to 0.28: few directions;
    - no warning, and rightly or not: lr 2e-3, RankMe 0.74; momentum 0.9, std 0.41 and RankMe 0.38
      at the worst, 1.06 and 0.52 at the end;
    - longer healthy runs: `demo` to step 480, std 1.00, RankMe 0.67; Fashion-MNIST, lr 1e-3, to
      step 468, std 0.69 and RankMe 0.64 at the worst (step 234), rising after.

    LiDAR (200 images, 8 crops each, average-pooled) tells them apart less clearly: 16 to 17
    untrained, 18 trained, without momentum 5.1 to 10.4 at lr 1e-2 and 6.3 at lr 5e-4, but 15.0 at
    lr 1e-2 with momentum 0.996. RankMe with the mean taken off misses the collapse at lr 5e-4.

    Args:
        monitors: of the network to judge; more keys do no harm.
        baseline: of the network before training.

    Raises:
        ValueError: a number is missing, not finite or negative.
    """
    for name, values in (("monitors", monitors), ("baseline", baseline)):
        for key in ("feature_std", "rankme"):
            value = values.get(key, math.nan)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must hold a finite {key} of at least 0, got {value}")
    std, first_std = monitors["feature_std"], baseline["feature_std"]
    rank, first_rank = monitors["rankme"], baseline["rankme"]
    if std < COLLAPSED_SHARE * first_std:
        what = "all patches of all images are getting the same features"
    elif rank < COLLAPSED_SHARE * first_rank:
        what = "features vary in a few directions only"
    else:
        return None
    return (
        f"features collapse: feature std went from {first_std:.3f} (at step 0) to "
        f"{std:.3f} and RankMe from {first_rank:.1f} to {rank:.1f}, so {what}. A low loss then "
        "says nothing: such features are easy to predict. Lower optim.lr, raise optim.momentum "
        "(0.996 is published), or warm up longer (optim.warmup); see docs/loss.md"
    )
