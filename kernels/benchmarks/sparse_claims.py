"""What unweave-kernels says about sparse codes, measured beside the ways of two training libraries.

Their steps are transcribed for this comparison alone, without their modules and `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from ratios import at_least
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

from claims_runner import Claim, Measure
from timing import median_seconds
from unweave.kernels.sparse import batch_topk, sparse_decode, sparse_encode, topk_sparse

Step = Callable[..., Tensor]

K = 64
DICTIONARY_LEARNING = (
    "dictionary_learning's BatchTopK transcribed: topk over all, scatter, dense product"
)
SPARSIFY = "sparsify's CPU form transcribed: topk per row, embedding_bag, FusedEncoder"


def batch_topk_time(seed: int, quick: bool) -> Claim:
    """Time of BatchTopK and decoding, forwards and backwards to activations and dictionary."""
    h, weight, bias, dictionary = inputs(seed, quick)
    x = linear(h, weight, bias).relu_()
    return compared(
        "sparse-batch-topk-time",
        "BatchTopK and decoding are faster than through a dense code",
        DICTIONARY_LEARNING,
        dense_batch_topk,
        sparse_batch_topk,
        [x, dictionary],
        3,
        quick,
    )


def topk_time(seed: int, quick: bool) -> Claim:
    """Time of TopK and decoding, forwards and backwards to activations and dictionary."""
    h, weight, bias, dictionary = inputs(seed, quick)
    x = linear(h, weight, bias).relu_()
    return compared(
        "sparse-topk-time",
        "TopK and decoding are faster than by topk and embedding_bag",
        SPARSIFY,
        bag_topk,
        sparse_topk,
        [x, dictionary],
        2,
        quick,
    )


def batch_topk_encoder_time(seed: int, quick: bool) -> Claim:
    """Time of a whole autoencoder with BatchTopK, forwards and backwards to all parameters."""
    h, *parameters = inputs(seed, quick)
    return compared(
        "sparse-batch-topk-encoder-time",
        "A BatchTopK autoencoder's step is faster than through a dense code",
        DICTIONARY_LEARNING,
        partial(dense_batch_topk_encoder, h),
        partial(sparse_batch_topk_encoder, h),
        parameters,
        3,
        quick,
    )


def topk_encoder_time(seed: int, quick: bool) -> Claim:
    """Time of a whole autoencoder with TopK, forwards and backwards to all parameters."""
    h, *parameters = inputs(seed, quick)
    return compared(
        "sparse-topk-encoder-time",
        "A TopK autoencoder's step is faster than by topk, embedding_bag and index_add",
        SPARSIFY,
        partial(bag_topk_encoder, h),
        partial(sparse_topk_encoder, h),
        parameters,
        2,
        quick,
    )


def compared(
    name: str,
    text: str,
    source: str,
    theirs: Step,
    ours: Step,
    tensors: list[Tensor],
    limit: float,
    quick: bool,
) -> Claim:
    """Require equal gradients, and claim how many times faster than `theirs` ours are."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    for one, other in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        error = (one - other).norm() / other.norm()
        if error > 1e-4:
            raise AssertionError(f"gradients of {name} differ by {error}")
    their_time, our_time = median_seconds(
        lambda: gradients(theirs, tensors),
        lambda: gradients(ours, tensors),
        repeats=3 if quick else 5,
    )
    rows, features, width = 4096, tensors[-1].shape[0], tensors[-1].shape[1]
    return at_least(
        name,
        text,
        source,
        f"{256 if quick else rows} rows, {features} features, k {K}, width {width}, forward and "
        f"backward, gradients equal; {1e3 * their_time:.0f} ms, ours {1e3 * our_time:.0f} ms",
        their_time / our_time,
        limit,
    )


def gradients(step: Step, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of all `tensors`."""
    return torch.autograd.grad(step(*tensors).square().mean(), tensors)


@cache
def inputs(seed: int, quick: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, encoder weight and bias, and dictionary."""
    rows, features, width = (256, 2048, 64) if quick else (4096, 16_384, 768)
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, width, generator=generator),
        torch.randn(features, width, generator=generator) / width**0.5,
        torch.randn(features, generator=generator) / 10,
        torch.randn(features, width, generator=generator) / width**0.5,
    )


def sparse_batch_topk(x: Tensor, dictionary: Tensor) -> Tensor:
    """Ours, from activations."""
    codes = batch_topk(x, K)
    return sparse_decode(codes.values, codes.indices, dictionary, crow=codes.crow)


def sparse_topk(x: Tensor, dictionary: Tensor) -> Tensor:
    """Ours, from activations."""
    return sparse_decode(*topk_sparse(x, K), dictionary)


def sparse_batch_topk_encoder(
    h: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor
) -> Tensor:
    """Ours: features are selected without a gradient, then encoded alone."""
    with torch.no_grad():
        codes = batch_topk(linear(h, weight, bias).relu_(), K)
    values = sparse_encode(h, weight, codes.indices, bias, crow=codes.crow).relu()
    return sparse_decode(values, codes.indices, dictionary, crow=codes.crow)


def sparse_topk_encoder(h: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor) -> Tensor:
    """Ours: features are selected without a gradient, some rows at a time, then encoded alone."""
    with torch.no_grad():
        parts = [topk_sparse(linear(part, weight, bias), K).indices for part in h.split(512)]
    indices = torch.cat(parts)
    return sparse_decode(sparse_encode(h, weight, indices, bias).relu(), indices, dictionary)


def dense_batch_topk(x: Tensor, dictionary: Tensor) -> Tensor:
    """The code of BatchTopK, zero where nothing was selected, times the dictionary."""
    best = x.flatten().topk(K * len(x), sorted=False)
    code = torch.zeros_like(x).flatten().scatter(-1, best.indices, best.values)
    return code.reshape(x.shape) @ dictionary


def dense_batch_topk_encoder(h: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor) -> Tensor:
    """The same after the encoder."""
    return dense_batch_topk(linear(h, weight, bias).relu(), dictionary)


def bag_topk(x: Tensor, dictionary: Tensor) -> Tensor:
    """Bags of rows of the dictionary, weighted by the largest activations."""
    values, indices = x.topk(K, sorted=False)
    return embedding_bag(indices, dictionary, per_sample_weights=values, mode="sum")


def bag_topk_encoder(h: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor) -> Tensor:
    """The same after the encoder with sparse gradients."""
    values, indices = SelectedLinear.apply(h, weight, bias)
    return embedding_bag(indices, dictionary, per_sample_weights=values, mode="sum")


class SelectedLinear(torch.autograd.Function):
    """The largest activations of a linear layer, whose weights' gradient is added by index."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Return values and indices."""
        values, indices = linear(h, weight, bias).relu().topk(K, dim=-1, sorted=False)
        ctx.save_for_backward(h, weight, bias, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor, Tensor]:
        """Return the gradients of weight and bias."""
        h, weight, bias, indices = ctx.saved_tensors
        flat = indices.flatten()
        terms = (grad[:, :, None] * h[:, None]).reshape(-1, h.shape[1])
        of_weight = torch.zeros_like(weight).index_add_(0, flat, terms)
        return None, of_weight, torch.zeros_like(bias).index_add_(0, flat, grad.flatten())


CLAIMS: dict[str, Measure] = {
    "sparse-batch-topk-time": batch_topk_time,
    "sparse-topk-time": topk_time,
    "sparse-batch-topk-encoder-time": batch_topk_encoder_time,
    "sparse-topk-encoder-time": topk_encoder_time,
}
