"""Scores of generated images: CLIP score, KID, FID, perceptual distance, and their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import normalize

from unweave.diffusion_core.errors import UnweaveError

FeatureExtractor = Callable[[Tensor], "Tensor | Sequence[Tensor]"]
"""Maps images (n, 3, H, W) to features (n, d), or to feature maps (n, channels, h, w) per layer."""


class ImageTextScorer(Protocol):
    """A model such as CLIP that puts images and texts in one space."""

    def image_features(self, images: Tensor) -> Tensor:
        """Return L2-normalised features (n, d) of images (n, 3, H, W) in [0, 1]."""
        ...

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Return L2-normalised features (n, d) of prompts."""
        ...


@torch.no_grad()
def clip_score(images: Tensor, prompts: Sequence[str], scorer: ImageTextScorer) -> Tensor:
    r"""Return how well each image (n, 3, H, W) agrees with its own prompt, in [0, 100], as (n,).

    .. math::
        \text{CLIPScore}(I, T) = \max(100 \cos(E_I, E_T), 0)

    The mean over images is the number usually reported (Hessel et al., 2021, arXiv:2104.08718).
    """
    if len(images) != len(prompts) or len(prompts) == 0:
        raise UnweaveError(
            "`images` and `prompts` must be equally many and not empty, "
            f"got {len(images)} images and {len(prompts)} prompts"
        )
    image_features = normalize(scorer.image_features(images).float(), dim=-1)
    text_features = normalize(scorer.text_features(list(prompts)).float(), dim=-1)
    cosine = (image_features * text_features.to(image_features.device)).sum(dim=-1)
    return (100 * cosine).clamp(min=0)


@torch.no_grad()
def kid(
    features_a: Tensor,
    features_b: Tensor,
    subsets: int = 100,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
    *,
    paired: bool = False,
) -> tuple[float, float]:
    r"""Return mean and standard deviation over subsets of the kernel distance of two feature sets.

    .. math::
        \text{KID} = \frac{\sum_{i \ne j} k(x_i, x_j) + \sum_{i \ne j} k(y_i, y_j)}{m (m - 1)}
        - \frac{2}{m^2} \sum_{i, j} k(x_i, y_j), \quad
        k(x, y) = \Big(\frac{x^\top y}{d} + 1\Big)^3

    where the :math:`m` = `subset_size` rows of each side are drawn without replacement. The
    estimate is unbiased for two independent samples, so it can be negative
    (Binkowski et al., 2018, arXiv:1801.01401). When both sides hold the same rows, pairs of equal
    rows pull it slightly below zero, by about :math:`2 (E[k(x, x)] - E[k(x, x')]) / n`.

    Args:
        features_a: (n_a, d).
        features_b: (n_b, d).
        subsets: how many subsets to average over.
        subset_size: rows per subset, from 2 to the size of the smaller set.
        generator: a CPU generator; a fresh one with seed 0 when absent, so results repeat.
        paired: row i of both sides belongs together, such as one prompt and seed before and after
            an edit. The same rows are drawn on both sides and :math:`k(x_i, y_i)` is left out of
            the cross term, which keeps the estimate unbiased and makes it 0 for equal sets
            (Gretton et al., 2012, equation 4).
    """
    a, b = _paired_features(features_a, features_b)
    smaller = min(len(a), len(b))
    if not 2 <= subset_size <= smaller:
        raise UnweaveError(
            f"`subset_size` must be from 2 to the size of the smaller set ({smaller}), "
            f"got {subset_size}; pass a smaller one or more images"
        )
    if subsets < 1:
        raise UnweaveError(f"`subsets` must be at least 1, got {subsets}")
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    if paired and len(a) != len(b):
        raise UnweaveError(f"paired sets must be equally large, got {len(a)} and {len(b)} rows")
    distances = []
    for _ in range(subsets):
        rows_a = torch.randperm(len(a), generator=generator)[:subset_size]
        rows_b = rows_a if paired else torch.randperm(len(b), generator=generator)[:subset_size]
        distances.append(_polynomial_mmd(a[rows_a], b[rows_b], paired=paired))
    values = torch.stack(distances)
    return values.mean().item(), values.std(correction=0).item()


@torch.no_grad()
def fid(features_a: Tensor, features_b: Tensor) -> float:
    r"""Return the Frechet distance of Gaussians fitted to two feature sets (n_a, d) and (n_b, d).

    .. math::
        \text{FID} = \|\mu_a - \mu_b\|^2
        + \operatorname{tr}\big(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2}\big)

    No covariance is formed: with centred rows :math:`A^\top A = \Sigma_a` and
    :math:`B^\top B = \Sigma_b`, the trace of the root is the sum of the singular values of
    :math:`A B^\top`. Biased for few samples, so compare only sets of equal size
    (Heusel et al., 2017, arXiv:1706.08500).
    """
    a, b = _paired_features(features_a, features_b)
    if min(len(a), len(b)) < 2:
        raise UnweaveError(f"FID needs two rows on each side, got {len(a)} and {len(b)}")
    mean_a, mean_b = a.mean(dim=0), b.mean(dim=0)
    root_a = _covariance_root(a - mean_a)
    root_b = _covariance_root(b - mean_b)
    trace_of_root = torch.linalg.svdvals(root_a @ root_b.T).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * trace_of_root
    distance: float = ((mean_a - mean_b).square().sum() + spread).item()
    return max(distance, 0.0)


@torch.no_grad()
def perceptual_distance(a: Tensor, b: Tensor, features: FeatureExtractor) -> Tensor:
    r"""Return the feature distance of each pair of images (n, 3, H, W), as (n,) in [0, 4].

    .. math::
        d(a, b) = \frac{1}{L} \sum_{l=1}^{L} \frac{1}{H_l W_l}
        \sum_{h, w} \big\| \hat f^l_{hw}(a) - \hat f^l_{hw}(b) \big\|^2

    where :math:`\hat f` has unit length along channels: LPIPS without its learned weights
    (Zhang et al., 2018, arXiv:1801.03924). For features of shape (n, d) it is
    :math:`2 - 2 \cos`.
    """
    if a.shape != b.shape:
        raise UnweaveError(
            "`a` and `b` must have the same shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}; resize one of them"
        )
    layers_a, layers_b = _as_layers(features(a)), _as_layers(features(b))
    distances = [
        (normalize(x.float(), dim=1) - normalize(y.float(), dim=1))
        .square()
        .sum(dim=1)
        .reshape(len(x), -1)
        .mean(dim=1)
        for x, y in zip(layers_a, layers_b, strict=True)
    ]
    return torch.stack(distances).mean(dim=0)


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    r"""Return the Wilson score interval of a rate: `successes` of `n` trials.

    .. math::
        \frac{1}{1 + z^2 / n} \bigg( \hat p + \frac{z^2}{2 n}
        \pm z \sqrt{\frac{\hat p (1 - \hat p)}{n} + \frac{z^2}{4 n^2}} \bigg)

    Unlike the normal interval it stays inside [0, 1] and is not empty at 0 of n (Wilson, 1927).

    Example:
        >>> low, high = wilson_interval(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    if n < 1 or not 0 <= successes <= n:
        raise UnweaveError(f"a rate needs 0 <= successes <= n and n >= 1, got {successes} of {n}")
    z = _normal_quantile(confidence)
    rate = successes / n
    shrink = 1 / (1 + z**2 / n)
    centre = shrink * (rate + z**2 / (2 * n))
    half = shrink * z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    low = 0.0 if successes == 0 else max(centre - half, 0.0)
    high = 1.0 if successes == n else min(centre + half, 1.0)
    return low, high


def bootstrap_interval(
    values: Sequence[float] | Tensor,
    seed: int = 0,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float]:
    r"""Return the percentile bootstrap interval of the mean of `values` (n,).

    .. math::
        \big[ q_{\alpha / 2}(\bar x^*), \; q_{1 - \alpha / 2}(\bar x^*) \big], \quad
        \alpha = 1 - \text{confidence}

    over means :math:`\bar x^*` of `resamples` draws with replacement. The same seed gives the
    same interval (Efron, 1979).
    """
    sample = torch.as_tensor(values, dtype=torch.float64).flatten().cpu()
    if len(sample) == 0:
        raise UnweaveError("`values` must hold at least one number, got none")
    if not torch.isfinite(sample).all():
        raise UnweaveError("`values` must be finite, got NaN or infinity among them")
    if not 0 < confidence < 1:
        raise UnweaveError(f"`confidence` must be in (0, 1), got {confidence}")
    generator = torch.Generator().manual_seed(seed)
    means = torch.stack(
        [
            sample[torch.randint(len(sample), (len(sample),), generator=generator)].mean()
            for _ in range(resamples)
        ]
    )
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _paired_features(features_a: Tensor, features_b: Tensor) -> tuple[Tensor, Tensor]:
    if features_a.ndim != 2 or features_b.ndim != 2 or features_a.shape[1] != features_b.shape[1]:
        raise UnweaveError(
            "features must be (n, d) with the same d on both sides, "
            f"got {tuple(features_a.shape)} and {tuple(features_b.shape)}"
        )
    a, b = features_a.detach().cpu().double(), features_b.detach().cpu().double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UnweaveError("features must be finite, got NaN or infinity among them")
    return a, b


def _polynomial_mmd(a: Tensor, b: Tensor, *, paired: bool) -> Tensor:
    between = _kernel(a, b)
    cross = _off_diagonal_mean(between) if paired else between.mean()
    return _off_diagonal_mean(_kernel(a, a)) + _off_diagonal_mean(_kernel(b, b)) - 2 * cross


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    size = len(kernel)
    return (kernel.sum() - kernel.trace()) / (size * (size - 1))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _covariance_root(centred: Tensor) -> Tensor:
    """Return R (min(n, d), d) with R^T R equal to the covariance of rows (n, d)."""
    triangle: Tensor = torch.linalg.qr(centred, mode="r").R
    return triangle / math.sqrt(len(centred) - 1)


def _as_layers(features: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [features] if isinstance(features, Tensor) else features


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise UnweaveError(f"`confidence` must be in (0, 1), got {confidence}")
    return math.sqrt(2) * torch.erfinv(torch.tensor(confidence, dtype=torch.float64)).item()
