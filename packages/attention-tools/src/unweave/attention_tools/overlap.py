"""How much two attention maps, or two masks, cover the same places.

All measures take (..., h, w), reduce the last two dimensions and broadcast over the others, so
`measure(maps[:, :, None], maps[:, None])` gives all pairs of tokens. All but `iou` are
differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.attention_tools.errors import MapError


def min_sum_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return sum min(a, b) / sum (a + b): 0 for maps apart, 0.5 for equal ones.

    The overlap that A-STAR (Agarwal et al. 2023, eq. 2) lowers. Two maps of zeros have 0. Raises
    `MapError` for maps of different sizes.

    >>> min_sum_ratio(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]]))
    tensor(0.3750)
    """
    a, b = _pair(a, b)
    return _ratio(torch.minimum(a, b).sum((-2, -1)), a.sum((-2, -1)) + b.sum((-2, -1)))


def soft_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return sum min(a, b) / sum max(a, b), which is `iou` for masks of 0 and 1.

    Two maps of zeros have 0. Raises `MapError` for maps of different sizes.

    >>> soft_iou(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]]))
    tensor(0.6000)
    """
    a, b = _pair(a, b)
    return _ratio(torch.minimum(a, b).sum((-2, -1)), torch.maximum(a, b).sum((-2, -1)))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of boolean masks, in [0, 1]; 0 when both are empty.

    Raises `MapError` for masks that are not boolean, or of different sizes.

    >>> iou(torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]]))
    tensor(0.3333)
    """
    for mask in (a, b):
        if mask.dtype != torch.bool:
            raise MapError(
                f"`iou` compares boolean masks, got {mask.dtype}: make them by `to_mask`, or use "
                "`soft_iou` for maps"
            )
    _check_sizes(a, b)
    return _ratio((a & b).sum((-2, -1)).float(), (a | b).sum((-2, -1)).float())


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two maps as distributions over places, in nats.

    Each map is divided by its sum first. 0 for maps of one shape, log 2 for maps apart. Raises
    `MapError` for maps of different sizes, with negative values or without mass.

    >>> jensen_shannon(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]]))
    tensor(0.6931)
    """
    a, b = _pair(a, b)
    for maps in (a, b):
        if (maps.detach() < 0).any() or (maps.detach().sum((-2, -1)) <= 0).any():
            raise MapError("`jensen_shannon` needs maps without negative values and with some mass")
    p, q = (maps / maps.sum((-2, -1), keepdim=True) for maps in (a, b))
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """Return sum p log(p / q), with finite gradients where p is 0."""
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum((-2, -1))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    empty = whole == 0
    return part / torch.where(empty, torch.ones_like(whole), whole)


def _pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    _check_sizes(a, b)
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return a.to(dtype), b.to(dtype)


def _check_sizes(a: Tensor, b: Tensor) -> None:
    if a.dim() < 2 or b.dim() < 2 or a.shape[-2:] != b.shape[-2:]:
        raise MapError(
            f"maps to compare must have the same height and width, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
