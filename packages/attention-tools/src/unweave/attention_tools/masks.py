"""Masks out of attention maps: thresholds, competition of tokens, smoothing, affinity.

Maps are (..., h, w). Masks are boolean of the same shape.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from unweave.attention_tools.errors import MapError
from unweave.attention_tools.maps import AttentionMaps

Method = Literal["otsu", "relative", "absolute", "mean"]
USUAL = {"relative": 0.5, "mean": 1.0}
"""The thresholds where none is given."""


def otsu_threshold(maps: Tensor) -> Tensor:
    """Return the threshold (...) of each map that parts its values best in two classes.

    Otsu (1979): the split with the largest variance between classes, here exact over all splits of
    the sorted values. The threshold is the largest value of the lower class, so `maps > threshold`
    is the upper one. A constant map gives its value, hence an empty mask. Time O(n log n) for maps
    of n places. Not differentiable. Raises `MapError` for values that are not finite.

    >>> otsu_threshold(torch.tensor([[0.1, 0.2, 0.8, 0.9]]))
    tensor(0.2000)
    """
    values = _checked(maps).detach().flatten(-2).sort(-1).values
    count = values.shape[-1]
    if count < 2:
        return values[..., 0]
    centred = values.double() - values.double().mean(-1, keepdim=True)
    below = centred.cumsum(-1)[..., :-1]
    size = torch.arange(1, count, dtype=torch.float64, device=values.device)
    # Of values with mean 0: w0 w1 (m0 - m1)^2 = s^2 / (w0 w1) / n^2, for s the sum of the lower.
    between = below**2 / (size * (count - size))
    between = between.masked_fill(values[..., :-1] == values[..., 1:], -1)
    best = between.argmax(-1, keepdim=True)
    constant = between.amax(-1) < 0
    return torch.where(constant, values[..., -1], values.gather(-1, best).squeeze(-1))


def to_mask(maps: Tensor, method: Method = "otsu", threshold: float | None = None) -> Tensor:
    """Return the places (..., h, w) where a map reaches its threshold.

    "otsu" is above `otsu_threshold`; "relative" at least `threshold` (0.5) of the map's maximum,
    where that is positive; "mean" above `threshold` (1) times its mean; "absolute" above
    `threshold` itself. Raises `MapError` for another method, a threshold that does not fit it, or
    values that are not finite.

    >>> to_mask(torch.tensor([[0.1, 0.4, 0.6, 1.0]]), "relative")
    tensor([[False, False,  True,  True]])
    """
    maps = _checked(maps).detach()
    if method == "otsu":
        if threshold is not None:
            raise MapError(f'"otsu" finds its own threshold, got `threshold` = {threshold}')
        return maps > otsu_threshold(maps)[..., None, None]
    if method not in (*USUAL, "absolute"):
        raise MapError(f'`method` must be "otsu", "relative", "absolute" or "mean", got {method!r}')
    level = USUAL.get(method) if threshold is None else threshold
    if level is None:
        raise MapError('"absolute" needs a `threshold`, got none')
    if method == "relative":
        peak = maps.amax((-2, -1), keepdim=True)
        return (maps >= level * peak) & (peak > 0)
    return maps > (level * maps.mean((-2, -1), keepdim=True) if method == "mean" else level)


def disjoint_masks(maps: Tensor, background: float | None = None) -> Tensor:
    """Return masks (..., tokens, h, w) that share no place: each goes to the token ahead there.

    Maps are first rescaled to [0, 1] each, so that a weak token can win. A place where no rescaled
    map is above `background` belongs to none; None takes the Otsu threshold of the largest rescaled
    map. Of equal maps the first wins.

    >>> maps = torch.tensor([[[0.1, 0.2, 0.9]], [[0.4, 0.0, 0.0]]])
    >>> disjoint_masks(maps, 0.5)
    tensor([[[False, False,  True]],
    <BLANKLINE>
            [[ True, False, False]]])
    """
    if maps.dim() < 3:
        raise MapError(f"`maps` must be (..., tokens, h, w), got {tuple(maps.shape)}")
    scaled = rescaled(maps.detach())
    ahead, token = scaled.max(-3)
    level = otsu_threshold(ahead)[..., None, None] if background is None else background
    tokens = torch.arange(maps.shape[-3], device=maps.device)[:, None, None]
    return (tokens == token.unsqueeze(-3)) & (ahead > level).unsqueeze(-3)


def rescaled(maps: Tensor) -> Tensor:
    """Return each map moved and scaled to [0, 1]; constant maps become 0.

    >>> rescaled(torch.tensor([[2.0, 3.0, 4.0]]))
    tensor([[0.0000, 0.5000, 1.0000]])
    """
    least = _checked(maps).amin((-2, -1), keepdim=True)
    span = maps.amax((-2, -1), keepdim=True) - least
    return (maps - least) / torch.where(span == 0, torch.ones_like(span), span)


def smooth(maps: Tensor, kernel_size: int = 3, sigma: float = 0.5) -> Tensor:
    """Return maps blurred by a Gaussian exp(-x^2 / (2 sigma^2)) of odd `kernel_size`, in pixels.

    Borders are reflected. Differentiable. Raises `MapError` when the kernel does not fit the maps.
    Attend-and-Excite's own blur has x^2 / (4 sigma^2) by a slip; here sigma is the true one.

    >>> smooth(torch.ones(2, 4, 4)).allclose(torch.ones(2, 4, 4))
    True
    """
    height, width = maps.shape[-2:]
    reach = kernel_size // 2
    if kernel_size < 1 or kernel_size % 2 == 0 or reach >= min(height, width):
        raise MapError(
            f"`kernel_size` must be odd and at most {2 * min(height, width) - 1} for maps of "
            f"{height}x{width}, got {kernel_size}"
        )
    if sigma <= 0:
        raise MapError(f"`sigma` must be above 0 pixels, got {sigma}")
    x = torch.arange(-reach, reach + 1, dtype=maps.dtype, device=maps.device)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    flat = pad(maps.reshape(-1, 1, height, width), (reach,) * 4, mode="reflect")
    blurred = conv2d(conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None])
    return blurred.reshape(maps.shape)


def refine_by_self_attention(
    maps: Tensor, self_attention: AttentionMaps | Tensor, iterations: int = 1
) -> Tensor:
    """Return maps (B, tokens, h, w) spread `iterations` times along self-attention: P^n x.

    A place takes the mean of the places that it attends to, so that a map fills the object that it
    began in. `self_attention` is what `capture_attention(layers="self")` recorded, of which the
    largest grid counts, averaged over its layers and steps; or probabilities (B, n, n) over the
    grid of `maps`, or one halved or doubled. Maps of another grid are resized bilinearly to that
    of the self-attention, and so is the result. Differentiable. Raises `MapError` when sizes differ
    in shape or batch, or when not all image positions were recorded.

    >>> maps = torch.tensor([[[[1.0, 0.0]]]])
    >>> refine_by_self_attention(maps, torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]))
    tensor([[[[0.5000, 0.0000]]]])
    """
    if maps.dim() != 4:
        raise MapError(f"`maps` must be (B, tokens, h, w), got {tuple(maps.shape)}")
    if iterations < 1:
        raise MapError(f"`iterations` must be at least 1, got {iterations}")
    affinity, grid = _affinity(self_attention, (maps.shape[-2], maps.shape[-1]))
    if affinity.shape[0] not in (1, maps.shape[0]):
        raise MapError(
            f"self-attention of {affinity.shape[0]} samples does not fit maps of {maps.shape[0]}"
        )
    if maps.shape[-2:] != grid:
        maps = interpolate(maps, grid, mode="bilinear", align_corners=False)
    x: Tensor = maps.flatten(2).transpose(1, 2)
    for _ in range(iterations):
        x = affinity.to(x) @ x
    spread: Tensor = x.transpose(1, 2).unflatten(2, grid)
    return spread


def _affinity(
    self_attention: AttentionMaps | Tensor, grid: tuple[int, int]
) -> tuple[Tensor, tuple[int, int]]:
    """Return probabilities (B, n, n) and the grid of the n places."""
    if isinstance(self_attention, AttentionMaps):
        grids = self_attention.grids
        if not grids:
            raise MapError('no self-attention was recorded: capture with `layers="self"`')
        grid = max(grids.values(), key=lambda size: size[0] * size[1])
        recorded = [
            values for (name, _), values in self_attention.values.items() if grids[name] == grid
        ]
        affinity = torch.stack(recorded).mean(0)
    else:
        affinity = self_attention
        height, width = grid
        places = affinity.shape[-1]
        scale = (places / (height * width)) ** 0.5
        grid = round(height * scale), round(width * scale)
    places = grid[0] * grid[1]
    if affinity.dim() != 3 or affinity.shape[1:] != (places, places):
        raise MapError(
            f"self-attention over {grid[0]}x{grid[1]} places must be (B, {places}, {places}), got "
            f"{tuple(affinity.shape)}: record it without `tokens`"
        )
    return affinity, grid


def _checked(maps: Tensor) -> Tensor:
    if maps.dim() < 2 or not maps.numel():
        raise MapError(f"maps must be (..., h, w) and not empty, got {tuple(maps.shape)}")
    if not maps.isfinite().all():
        raise MapError("maps must be finite, got NaN or infinite values")
    return maps
