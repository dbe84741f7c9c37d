"""Numbers about representations that need no labels, and a warning where they have collapsed.

Pure functions of tensors, computed in float64. Letters: n rows, D feature width.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["collapse_warning", "feature_std", "lidar", "prediction_cosine", "rankme"]

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
        ValueError: a value is not finite.
    """
    _check("features", features)
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
        ValueError: a value is not finite.
    """
    _check("features", features)
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
        ValueError: a value is not finite.
    """
    _check("features", features)
    return features.double().std(dim=0).mean().item()


def _soft_rank(values: Tensor) -> float:
    total = values.sum()
    if total == 0:
        return 0.0
    share = values / total + EPSILON
    return math.exp(-(share * share.log()).sum().item())


def _check(name: str, features: Tensor) -> None:
    if not features.isfinite().all():
        raise ValueError(
            f"{name} must be finite, got {int((~features.isfinite()).sum())} values that are not"
        )


def prediction_cosine(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Cosine between predicted and target features, beside what a constant prediction gets.

    Targets share a common direction: a cosine of 0.8 may be that alone. Only what lies above
    `mean_target_cosine` was predicted. Where that is itself near 1, all targets are the same.

    Args:
        prediction, target: (n, D), finite, at least 2 rows, row by row; a row of zeros has cosine
            0.

    Returns:
        Mean cosines: `prediction_cosine` between a prediction and its target, `mean_target_cosine`
        between the mean of all targets and a target (what a constant gets), and `shuffled_cosine`
        between a prediction and the target half of the rows further on, which is of another image
        where rows are sorted by image.
    """
    _check("prediction", prediction)
    _check("target", target)
    p, t = prediction.double(), target.double()
    pairs = {
        "prediction_cosine": (p, t),
        "mean_target_cosine": (t.mean(dim=0, keepdim=True), t),
        "shuffled_cosine": (p, t.roll(len(t) // 2, dims=0)),
    }
    return {name: F.cosine_similarity(*pair).mean().item() for name, pair in pairs.items()}


def collapse_warning(monitors: Mapping[str, float], baseline: Mapping[str, float]) -> str | None:
    """A warning in words where features have collapsed, else None.

    Both mappings hold `feature_std` and `rankme` of the target encoder's patch features, one row a
    patch, of the same images; `baseline` is of the untrained network. The warning is given where
    either has fallen below 0.3 of it: docs/log/learning.md has the runs that this was measured on.

    Args:
        monitors: of the network to judge; more keys do no harm.
        baseline: of the network before training.
    """
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
