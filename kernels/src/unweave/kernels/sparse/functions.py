"""Encode by the largest activations, and decode what few of them say."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from unweave.kernels.sparse import ops, reference


class TopK(NamedTuple):
    """Codes with as many entries in each row."""

    values: Tensor
    """The largest elements (..., k), largest first, with the gradient of the input."""

    indices: Tensor
    """Their features, int64 (..., k)."""


class CsrCodes(NamedTuple):
    """Codes with any number of entries in a row, as in `torch.sparse_csr_tensor`."""

    values: Tensor
    """The entries (n,), row by row, with the gradient of the input."""

    indices: Tensor
    """Their features, int64 (n,), rising within a row."""

    crow: Tensor
    """Where the entries of each row start, and n: int64 (B + 1,)."""


def topk_sparse(x: Tensor, k: int) -> TopK:
    """Return the `k` largest elements of each row of `x` (..., F), or all when F < k.

    TopK autoencoders (arXiv 2406.04093). Equal elements are ordered by feature. NaN counts as
    larger than everything. `values` are differentiable; the gradient of `x` is dense. Floating
    dtypes of 16 bits are compared in float32, which changes no order. Time O(B F + B k log k)
    unless a row's largest elements lie close together, memory O(B F / 32 + B k). Raises
    `ValueError` naming what does not fit.

    >>> topk_sparse(torch.tensor([[0.0, 3.0, 1.0, 3.0]]), 2)
    TopK(values=tensor([[3., 3.]]), indices=tensor([[1, 3]]))
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"`x` must be floating (..., F), got {x.dtype} {tuple(x.shape)}")
    if k < 0:
        raise ValueError(f"`k` must be at least 0, got {k}")
    k = min(k, x.shape[-1])
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1])
    indices = ops.topk(rows, k).reshape(*x.shape[:-1], k)
    return TopK(x.gather(-1, indices), indices)


def batch_topk(x: Tensor, k_per_row: int) -> CsrCodes:
    """Return the B `k_per_row` largest of all elements of `x` (B, F), grouped by row.

    BatchTopK autoencoders (arXiv 2412.06410), which pass activations after ReLU. Exactly
    B min(k_per_row, F) entries are returned, zeros or negative ones if there are not enough
    others; of equal elements the first by row and then by feature. NaN counts as larger than
    everything. `values` are differentiable; the gradient of `x` is dense. Dtypes are those of
    `topk_sparse`. Time O(B F), and no sort of all elements; memory O(B F / 32 + B k). Raises
    `ValueError` naming what does not fit.

    To select by scores that are not the activations, such as those of a crosscoder, take the
    activations at `indices`, or divide the values by the factor at `indices`.

    >>> batch_topk(torch.tensor([[5.0, 1.0, 4.0], [0.0, 2.0, 1.0]]), 1)
    CsrCodes(values=tensor([5., 4.]), indices=tensor([0, 2]), crow=tensor([0, 2, 2]))
    """
    _check_rows(x)
    if k_per_row < 0:
        raise ValueError(f"`k_per_row` must be at least 0, got {k_per_row}")
    count = x.shape[0] * min(k_per_row, x.shape[1])
    return _codes(x, *ops.batch_topk(x.detach(), count))


def threshold_sparse(x: Tensor, threshold: float | Tensor) -> CsrCodes:
    """Return all elements of `x` (B, F) that are larger than `threshold`, grouped by row.

    The encoding of BatchTopK autoencoders after training, where no row depends on its batch; see
    `update_threshold`. NaN counts as larger than everything. `values` are differentiable in `x`,
    with a dense gradient. Time O(B F), memory O(B F / 32 + n). Raises `ValueError` naming what
    does not fit.

    >>> threshold_sparse(torch.tensor([[0.1, 0.9], [0.8, 0.7]]), 0.75)
    CsrCodes(values=tensor([0.9000, 0.8000]), indices=tensor([1, 0]), crow=tensor([0, 1, 2]))
    """
    _check_rows(x)
    limit = torch.as_tensor(threshold, dtype=x.dtype, device=x.device).detach()
    if limit.dim():
        raise ValueError(f"`threshold` must be one number, got the shape {tuple(limit.shape)}")
    return _codes(x, *ops.above(x.detach(), limit))


@torch.no_grad()
def update_threshold(threshold: Tensor, values: Tensor, *, decay: float = 0.999) -> None:
    """Move `threshold` towards the least positive of `values`, in place.

    `threshold` is a floating tensor without dimensions, `values` what `batch_topk` kept of a batch,
    of any shape. A negative threshold is one not yet set: it becomes that least value. Later it is
    the moving average with `decay` of arXiv 2412.06410, section 3. A batch without positive values
    changes nothing; NaN is not positive.

    >>> threshold = torch.tensor(-1.0)
    >>> update_threshold(threshold, torch.tensor([0.0, 2.0, 3.0]))
    >>> update_threshold(threshold, torch.tensor([4.0]), decay=0.5)
    >>> threshold
    tensor(3.)
    """
    if threshold.dim() or not threshold.is_floating_point():
        raise ValueError(
            "`threshold` must be a floating tensor without dimensions, got "
            f"{threshold.dtype} {tuple(threshold.shape)}"
        )
    if not 0 <= decay <= 1:
        raise ValueError(f"`decay` must be in [0, 1], got {decay}")
    if not values.numel():
        return
    least = values.where(values > 0, torch.inf).amin().to(threshold)
    moved = torch.where(threshold < 0, least, threshold.lerp(least, 1 - decay))
    threshold.copy_(torch.where(least < torch.inf, moved, threshold))


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    dictionary: Tensor,
    *,
    crow: Tensor | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Return sum_j values[..., j] dictionary[indices[..., j]] for a dictionary (F, d).

    `values` and int64 `indices` are (..., k) and the result (..., d); or with `crow` (B + 1,),
    both are (n,) as in `CsrCodes` and the result is (B, d). An index may occur more than once in a
    row. Differentiable in `values` and `dictionary`, any number of times. Entries are grouped by
    feature for the gradient of the dictionary, so it does not depend on the number of threads.
    With `sparse_grad` it is a sparse tensor that holds the features that occur alone, as that of
    `torch.nn.Embedding`; a compiled graph cannot contain it. Sums are in float32 for 16-bit
    dtypes. Values that are not finite make what they touch so, also where the factor is zero. Time
    O(n d), memory O(B d), backwards O(F d + n). Raises `ValueError` naming what does not fit.

    >>> sparse_decode(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 0]]), torch.eye(3))
    tensor([[1., 2., 0.]])
    """
    _check_dictionary("dictionary", dictionary)
    _check_like("values", values, "dictionary", dictionary)
    if values.shape != indices.shape:
        raise ValueError(
            "`values` and `indices` must have one shape, got "
            f"{tuple(values.shape)} and {tuple(indices.shape)}"
        )
    crow, batch = _row_starts(indices, crow, dictionary)
    out = ops.decode(values.reshape(-1), indices.reshape(-1), crow, dictionary, sparse_grad)
    return out.reshape(*batch, dictionary.shape[1])


def sparse_encode(
    x: Tensor,
    weight: Tensor,
    indices: Tensor,
    bias: Tensor | None = None,
    *,
    crow: Tensor | None = None,
) -> Tensor:
    """Return x . weight[i] + bias[i] at the features i of `indices` alone.

    `x` is (..., d), `weight` (F, d), `bias` (F,) and `indices` int64 (..., k), as is the result; or
    with `crow` (B + 1,), `x` is (B, d) and `indices` and the result (n,), as in `CsrCodes`. Select
    features without a gradient, then encode them by this: the gradients of a linear layer and a
    selection without a dense gradient of its output. Differentiable in `x`, `weight` and `bias`,
    any number of times. Dtypes and NaN as in `sparse_decode`; the order of a sum depends on the
    processor, not on threads. Time O(n d), memory O(n), backwards O((B + F) d + n). Raises
    `ValueError` naming what does not fit.

    >>> x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([0.0, 0.5])
    >>> sparse_encode(x, weight, torch.tensor([[1]]), bias)
    tensor([[2.5000]])
    """
    _check_dictionary("weight", weight)
    _check_like("x", x, "weight", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            "`x` must be (..., d) and `weight` (F, d), got "
            f"{tuple(x.shape)} and {tuple(weight.shape)}"
        )
    crow, batch = _row_starts(indices, crow, weight)
    if x.shape[:-1] != batch:
        raise ValueError(
            f"`x` must have the rows {tuple(batch)} of the entries, got {tuple(x.shape)}"
        )
    flat = indices.reshape(-1)
    out = ops.encode(x.reshape(batch.numel(), x.shape[-1]), weight, flat, crow)
    if bias is not None:
        _check_like("bias", bias, "weight", weight)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"`bias` must be {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
        out = out + bias.gather(0, flat)
    return out.reshape(indices.shape)


def _codes(x: Tensor, indices: Tensor, crow: Tensor) -> CsrCodes:
    """Take the entries of `x` (B, F)."""
    places = reference.rows(crow, indices.shape[0]) * x.shape[1] + indices
    return CsrCodes(x.reshape(-1).gather(0, places), indices, crow)


def _row_starts(
    indices: Tensor, crow: Tensor | None, dictionary: Tensor
) -> tuple[Tensor, torch.Size]:
    """Return where the entries of each row start, and the shape of the rows."""
    if indices.dtype != torch.int64 or indices.device != dictionary.device or not indices.dim():
        raise ValueError(
            f"`indices` must be int64 (..., k) on {dictionary.device}, got {indices.dtype} "
            f"{tuple(indices.shape)} on {indices.device}"
        )
    if crow is None:
        batch, k = indices.shape[:-1], indices.shape[-1]
        return torch.arange(batch.numel() + 1, device=indices.device) * k, batch
    if crow.dtype != torch.int64 or crow.dim() != 1 or not len(crow) or indices.dim() != 1:
        raise ValueError(
            "with `crow`, it must be int64 (B + 1,) and the entries (n,), got "
            f"{crow.dtype} {tuple(crow.shape)} and {tuple(indices.shape)}"
        )
    return crow.contiguous(), torch.Size([crow.shape[0] - 1])


def _check_rows(x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"`x` must be floating (B, F), got {x.dtype} {tuple(x.shape)}")


def _check_dictionary(name: str, dictionary: Tensor) -> None:
    if dictionary.dim() != 2 or not dictionary.is_floating_point():
        raise ValueError(
            f"`{name}` must be floating (F, d), got {dictionary.dtype} {tuple(dictionary.shape)}"
        )


def _check_like(name: str, x: Tensor, other: str, dictionary: Tensor) -> None:
    if (x.dtype, x.device) != (dictionary.dtype, dictionary.device):
        raise ValueError(
            f"`{name}` and `{other}` must have one dtype and device, got {x.dtype} on {x.device} "
            f"and {dictionary.dtype} on {dictionary.device}"
        )
