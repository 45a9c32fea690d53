"""Two gradients made to agree: what one takes away from the other, per tensor or as a whole.

DoCo (arXiv 2405.15304) lets the gradient that unlearns keep only what does not work against the
gradient that preserves. The projection is that of PCGrad (arXiv 2001.06782).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from unweave.diffusion_core.errors import SelectionError

Scope = Literal["per_tensor", "global"]
"""What a projection is taken over: each tensor alone, or all of them as one vector."""


def remove_conflict(
    gradients: Sequence[Tensor],
    preserving: Sequence[Tensor],
    *,
    scope: Scope = "per_tensor",
    strength: float = 1.0,
    legacy_scale: bool = False,
) -> list[Tensor]:
    """Return `gradients` without what they have against the `preserving` ones, of equal shapes.

    Where <g, r> < 0, g becomes g - strength <g, r> / ||r||^2 r, which for strength 1 is orthogonal
    to r; elsewhere g stays as it is, bit by bit. `legacy_scale` divides the correction by ||g||, as
    the authors' code does: only for reproducing it, since for ||g|| < 1 it takes away too much.
    Raises `SelectionError` for lists that do not match.

    >>> g, r = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 2.0])
    >>> remove_conflict([g], [r])
    [tensor([1., 0.])]
    """
    _check(gradients, preserving, scope)
    products = _per_tensor(gradients, preserving)
    squares = _per_tensor(preserving, preserving)
    norms = _per_tensor(gradients, gradients).sqrt()
    if scope == "global":
        products, squares = (x.sum().expand(len(x)) for x in (products, squares))
        norms = norms.square().sum().sqrt().expand(len(norms))
    factors = torch.where(products < 0, strength * products / squares, 0.0)
    if legacy_scale:
        factors = torch.where(products < 0, factors / norms, 0.0)
    return [
        gradient - factor.to(gradient.dtype) * other
        for gradient, other, factor in zip(gradients, preserving, factors, strict=True)
    ]


def clip_norm(gradients: Sequence[Tensor], max_norm: float) -> list[Tensor]:
    """Return `gradients` scaled down, if need be, to the norm `max_norm` as one vector.

    >>> clip_norm([torch.tensor([3.0]), torch.tensor([4.0])], 1.0)
    [tensor([0.6000]), tensor([0.8000])]
    """
    scale = (max_norm / get_total_norm(list(gradients))).clamp(max=1.0)
    return [gradient * scale for gradient in gradients]


def with_gradients(
    value: Tensor, parameters: Iterable[Tensor], gradients: Iterable[Tensor]
) -> Tensor:
    """Return a scalar equal to `value` (), whose gradients for `parameters` are `gradients`.

    This is how gradients that no loss has are handed to a training loop that calls `backward`.

    >>> weight = torch.ones(2, requires_grad=True)
    >>> loss = with_gradients(torch.tensor(7.0), [weight], [torch.tensor([1.0, -2.0])])
    >>> loss.backward()
    >>> loss.item(), weight.grad.tolist()
    (7.0, [1.0, -2.0])
    """
    total = value.detach()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        total = total + ((parameter - parameter.detach()) * gradient.detach()).sum()
    return total


def _per_tensor(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Return the inner product of each pair, in float64, (number of tensors,)."""
    pairs = zip(first, second, strict=True)
    return torch.stack([torch.sum(a.double() * b.double()) for a, b in pairs])


def _check(gradients: Sequence[Tensor], preserving: Sequence[Tensor], scope: str) -> None:
    if scope not in get_args(Scope):
        raise SelectionError(f"`scope` must be one of {get_args(Scope)}, got {scope!r}")
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (gradients, preserving)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise SelectionError(
            "`gradients` and `preserving` must be lists of tensors of equal shapes, got "
            f"{shapes[0]} and {shapes[1]}"
        )
