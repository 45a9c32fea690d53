"""What unweave-kernels says about its speed and memory, measured beside the usual ways."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import graph_claims
import groupwise_claims
import sparse_claims
import torch
from ratios import BUSY, at_least, listed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from claims_runner import Claim, Measure
from timing import median_seconds, peak_bytes
from unweave.kernels import (
    attention_maps,
    attention_with_maps,
    nearest_code,
    scalar_quantize,
    sinkhorn,
    streaming_logsumexp_topk,
)

Attention = Callable[[Tensor, Tensor, Tensor], Any]

UNET = {4096: 40, 1024: 80, 256: 160}
"""Features a head by number of queries: cross-attention of Stable Diffusion 1.5 at 512 pixels."""

TOKENS, WANTED = 77, [2, 5]
DIT_TOKENS, DIT_WANTED = 1024 + 176, list(range(8))
CODES = ((65_536, 8_192, 64), (4_096, 10_000, 512))
"""Rows, codes and features."""

TOLERANCE = 2e-5


def unet_time(seed: int, quick: bool) -> Claim:
    """Time of the output and two maps, against fused attention without maps."""
    ratios = unet_ratios(
        lambda q, k, v: scaled_dot_product_attention(q, k, v),
        lambda q, k, v: attention_with_maps(q, k, v, columns=WANTED),
        seed,
        quick,
    )
    slower = {queries: 1 / ratio for queries, ratio in ratios.items()}
    return Claim.at_most(
        "attention-unet-time",
        "Attention with the maps of two tokens costs little more than attention",
        "torch scaled_dot_product_attention without maps",
        f"SD 1.5 shapes, batch 2, 8 heads, {TOKENS} tokens, forward; {listed(slower)}",
        value=max(slower.values()),
        limit=1.1,
        unit="x",
        digits=".2f",
        note=BUSY,
    )


def unet_memory(seed: int, quick: bool) -> Claim:
    """Memory beyond that of the output, against keeping all probabilities."""
    ratios = {}
    for queries in sizes(quick):
        q, k, v = unet_inputs(queries, seed)
        require_parity(q, k, v)
        output = q.numel() * q.element_size()
        ours = peak_bytes(lambda q=q, k=k, v=v: attention_with_maps(q, k, v, columns=WANTED))
        explicit = peak_bytes(lambda q=q, k=k, v=v: explicit_attention(q, k, v))
        ratios[queries] = (explicit - output) / max(1, ours - output)
    return at_least(
        "attention-unet-memory",
        "Maps of two tokens take a fraction of the memory of all probabilities",
        "explicit softmax that keeps the maps, as diffusers' AttnProcessor",
        f"SD 1.5 shapes, forward, bytes beyond the output; {listed(ratios)}",
        min(ratios.values()),
        8,
    )


def unet_gradient(seed: int, quick: bool) -> Claim:
    """Time forwards and backwards to the queries, from output and maps."""
    ratios = unet_ratios(
        lambda q, k, v: gradient(q, *explicit_attention(q, k, v)),
        lambda q, k, v: gradient(q, *attention_with_maps(q, k, v, columns=WANTED)),
        seed,
        quick,
    )
    return at_least(
        "attention-unet-gradient",
        "Output, maps and the gradient of the queries are faster than through explicit softmax",
        "explicit softmax that keeps the maps, as diffusers' AttnProcessor",
        f"SD 1.5 shapes, forward and backward to q; {listed(ratios)}",
        min(ratios.values()),
        1.5,
    )


def unet_maps_gradient(seed: int, quick: bool) -> Claim:
    """Time of maps alone, forwards and backwards to the queries."""
    ratios = unet_ratios(
        lambda q, k, v: gradient(q, explicit_maps(q, k)[..., WANTED].mean(1)),
        lambda q, k, v: gradient(q, attention_maps(q, k, columns=WANTED)),
        seed,
        quick,
    )
    return at_least(
        "attention-unet-maps-gradient",
        "Maps alone and the gradient of the queries are faster than through explicit softmax",
        "explicit softmax over all tokens",
        f"SD 1.5 shapes, forward and backward to q; {listed(ratios)}",
        min(ratios.values()),
        1.5,
    )


def dit_time(seed: int, quick: bool) -> Claim:
    """Time that maps add to fused joint attention, against recomputing all probabilities."""
    q, k, v = dit_inputs(seed, 128 if quick else DIT_TOKENS)
    _, maps = attention_with_maps(q, k, v, columns=DIT_WANTED)
    torch.testing.assert_close(maps, recomputed_maps(q, k), rtol=0, atol=TOLERANCE)
    ours, bare, recompute = median_seconds(
        lambda: attention_with_maps(q, k, v, columns=DIT_WANTED),
        lambda: scaled_dot_product_attention(q, k, v),
        lambda: recomputed_maps(q, k),
        repeats=3 if quick else 11,
    )
    return at_least(
        "attention-dit-time",
        "In joint attention the maps of eight tokens add a fraction of a full recompute's time",
        "attention-map-diffusers 1.0 (its operator transcribed: float32, chunks of 1,024 queries)",
        f"24 heads, {q.shape[2]} tokens, 128 features; attention {1e3 * bare:.0f} ms, with maps "
        f"{1e3 * ours:.0f} ms, recompute {1e3 * recompute:.0f} ms more",
        recompute / max(ours - bare, 1e-6),
        10,
    )


def nearest_code_time(seed: int, quick: bool) -> Claim:
    """Time of nearest codes, against all distances and their minimum."""
    ratios = {}
    for rows, codes, width in [(512, 1024, 64)] if quick else CODES:
        x, codebook = code_inputs(rows, codes, width, seed)
        require_nearest(x, codebook)
        ours, distances = median_seconds(
            lambda x=x, codebook=codebook: nearest_code(x, codebook),
            lambda x=x, codebook=codebook: torch.cdist(x, codebook).argmin(1),
            repeats=3 if quick else 7,
        )
        ratios[codes] = distances / ours
    return at_least(
        "nearest-code-time",
        "Nearest codes are found faster than by all distances",
        "torch.cdist and argmin",
        f"65,536 rows of 64 features, 4,096 rows of 512; {listed(ratios)} codes",
        min(ratios.values()),
        2,
    )


def nearest_code_faiss(seed: int, quick: bool) -> Claim:
    """Time of nearest codes, against the exact search of faiss."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    ratios = {}
    for rows, codes, width in [(512, 1024, 64)] if quick else CODES:
        x, codebook = code_inputs(rows, codes, width, seed)
        index = faiss.IndexFlatL2(width)
        index.add(codebook.numpy())
        require_nearest(x, codebook)
        ours, theirs = median_seconds(
            lambda x=x, codebook=codebook: nearest_code(x, codebook),
            lambda x=x, index=index: index.search(x.numpy(), 1),
            repeats=3 if quick else 7,
        )
        ratios[codes] = theirs / ours
    return at_least(
        "nearest-code-faiss",
        "Nearest codes are found as fast as by faiss",
        f"faiss-cpu {faiss.__version__} IndexFlatL2, its index built before",
        f"65,536 rows of 64 features, 4,096 rows of 512; {listed(ratios)} codes",
        min(ratios.values()),
        1,
    )


def nearest_code_memory(seed: int, quick: bool) -> Claim:
    """Memory beyond the inputs, as a part of all distances."""
    shares = {}
    for rows, codes, width in [(4096, 8192, 16)] if quick else CODES:
        x, codebook = code_inputs(rows, codes, width, seed)
        used = peak_bytes(lambda x=x, codebook=codebook: nearest_code(x, codebook))
        shares[codes] = 100 * used / (4 * rows * codes)
    each = ", ".join(f"{share:.1f} % at {codes} codes" for codes, share in shares.items())
    return Claim.at_most(
        "nearest-code-memory",
        "Nearest codes take little memory beside what all distances would",
        "a float32 matrix of all distances",
        f"65,536 rows of 64 features, 4,096 rows of 512; {each}",
        value=max(shares.values()),
        limit=5,
        unit="%",
        note=BUSY,
    )


def scalar_quantize_time(seed: int, quick: bool) -> Claim:
    """Time of quantizing latents, against the distance to every value."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1_000 if quick else 65_536, 12, generator=generator)
    values = torch.linspace(-1, 1, 10).repeat(12, 1)

    def broadcast() -> Tensor:
        indices = (z[..., None] - values).abs().argmin(-1)
        codes = values[torch.arange(12), indices]
        return z + (codes - z).detach()

    torch.testing.assert_close(scalar_quantize(z, values).values, broadcast())
    ours, usual = median_seconds(lambda: scalar_quantize(z, values), broadcast)
    return at_least(
        "scalar-quantize-time",
        "Latents are quantized faster than by their distance to every value",
        "the broadcast form of QLAE; LatentQuantize of vector-quantize-pytorch, which is the same, "
        "cannot be built for 10^12 codes",
        f"{len(z)} rows of 12 latents, 10 values each",
        usual / ours,
        5,
    )


def ranking_time(seed: int, quick: bool) -> Claim:
    """Time of log-sum-exp and best keys, against all products."""
    queries, keys = ranking_inputs(seed, quick)
    require_ranking(queries, keys)
    ours, usual = median_seconds(
        lambda: streaming_logsumexp_topk(queries, keys, 40),
        lambda: all_products(queries, keys),
        repeats=3 if quick else 7,
    )
    return at_least(
        "ranking-time",
        "Log-sum-exp and the best 40 of all keys are found faster than from all products",
        "matmul, logsumexp and topk",
        f"{len(queries)} queries, {len(keys)} keys, 32 features",
        usual / ours,
        1.5,
    )


def ranking_memory(seed: int, quick: bool) -> Claim:
    """Memory beyond the inputs, as a part of that of all products."""
    queries, keys = ranking_inputs(seed, quick)
    ours = peak_bytes(lambda: streaming_logsumexp_topk(queries, keys, 40))
    usual = peak_bytes(lambda: all_products(queries, keys))
    return Claim.at_most(
        "ranking-memory",
        "Ranking all keys takes little memory beside all products",
        "matmul, logsumexp and topk",
        f"{len(queries)} queries, {len(keys)} keys, 32 features",
        value=100 * ours / usual,
        limit=10,
        unit="%",
        note="the best keys of the queries, gathered for their values, are the larger part",
    )


def sinkhorn_time(seed: int, quick: bool) -> Claim:
    """Time of three iterations, against the usual loop."""
    size = (64, 4096) if quick else (512, 131_072)
    scores = torch.randn(size, generator=torch.Generator().manual_seed(seed)) / 4
    torch.testing.assert_close(sinkhorn(scores), sinkhorn_loop(scores), rtol=1e-3, atol=1e-6)
    ours, usual = median_seconds(
        lambda: sinkhorn(scores), lambda: sinkhorn_loop(scores), repeats=3 if quick else 7
    )
    return at_least(
        "sinkhorn-time",
        "Sinkhorn-Knopp is faster than the usual loop",
        "the loop of SwAV and DINOv2, which divides the matrix in place",
        f"{size[0]} samples, {size[1]} prototypes, 3 iterations, temperature 0.05",
        usual / ours,
        2,
    )


def unet_ratios(peer: Attention, ours: Attention, seed: int, quick: bool) -> dict[int, float]:
    """How many times faster than `peer` we are, by number of queries that require a gradient."""
    ratios = {}
    for queries in sizes(quick):
        q, k, v = unet_inputs(queries, seed)
        require_parity(q, k, v)
        q = q.clone().requires_grad_()
        theirs, own = median_seconds(
            partial(peer, q, k, v), partial(ours, q, k, v), repeats=3 if quick else 15
        )
        ratios[queries] = theirs / own
    return ratios


def sizes(quick: bool) -> list[int]:
    """The numbers of queries that are measured."""
    return [256] if quick else list(UNET)


@cache
def unet_inputs(queries: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a cross-attention layer, batch 2, 8 heads."""
    generator = torch.Generator().manual_seed(seed)
    width = UNET[queries]
    q = torch.randn(2, 8, queries, width, generator=generator)
    return q, *(torch.randn(2, 8, TOKENS, width, generator=generator) for _ in range(2))


@cache
def code_inputs(rows: int, codes: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows and a codebook."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return x, torch.randn(codes, width, generator=generator)


def require_nearest(x: Tensor, codebook: Tensor) -> None:
    """Raise `AssertionError` unless no code is nearer than those found, for some of the rows."""
    _, distances = nearest_code(x, codebook)
    best = torch.cdist(x[:256].double(), codebook.double()).amin(1)
    torch.testing.assert_close(distances[:256].double(), best, rtol=1e-5, atol=1e-5)


def ranking_inputs(seed: int, quick: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys, as many as a batch of users and the items of Gowalla's size."""
    generator = torch.Generator().manual_seed(seed)
    count, items = (256, 4096) if quick else (4096, 57_440)
    return (
        torch.randn(count, 32, generator=generator),
        torch.randn(items, 32, generator=generator),
    )


def require_ranking(queries: Tensor, keys: Tensor) -> None:
    """Raise `AssertionError` unless log-sum-exp and best products are those of all products."""
    lse, values = all_products(queries[:256], keys)
    found = streaming_logsumexp_topk(queries[:256], keys, 40)
    torch.testing.assert_close(found.lse, lse)
    torch.testing.assert_close(found.values, values, rtol=1e-4, atol=1e-4)


def all_products(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and the best 40 from the matrix of all products."""
    scores = queries @ keys.T
    return scores.logsumexp(1), scores.topk(40, dim=1).values


def sinkhorn_loop(scores: Tensor, eps: float = 0.05, iters: int = 3) -> Tensor:
    """The usual form: the transposed matrix, divided in place."""
    q = (scores / eps).exp().T.contiguous()
    q /= q.sum()
    for _ in range(iters):
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    q *= q.shape[1]
    return q.T


def dit_inputs(seed: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a joint attention layer, batch 1, 24 heads."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 24, tokens, 128, generator=generator) for _ in range(3))
    return q, k, v


def require_parity(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `AssertionError` unless output, maps and gradient are those of explicit softmax."""
    q = q.detach().requires_grad_()
    ours = attention_with_maps(q, k, v, columns=WANTED)
    theirs = explicit_attention(q, k, v)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(gradient(q, *ours), gradient(q, *theirs), rtol=1e-4, atol=1e-4)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The output and the wanted maps from stored probabilities."""
    p = explicit_maps(q, k)
    return p @ v, p[..., WANTED].mean(1)


def explicit_maps(q: Tensor, k: Tensor) -> Tensor:
    """All probabilities."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def recomputed_maps(q: Tensor, k: Tensor) -> Tensor:
    """The wanted maps from scores made again, a part of the queries at a time."""
    scale, parts = q.shape[-1] ** -0.5, []
    for part in q.split(1024, dim=2):
        p = (part.float() @ k.float().transpose(-1, -2) * scale).softmax(-1)
        parts.append(p[..., DIT_WANTED].mean(1))
    return torch.cat(parts, 1)


def gradient(q: Tensor, *results: Tensor) -> Tensor:
    """The gradient of `q` from all of `results`."""
    (own,) = torch.autograd.grad([result.square().sum() for result in results], q)
    return own


CLAIMS: dict[str, Measure] = {
    "attention-unet-time": unet_time,
    "attention-unet-memory": unet_memory,
    "attention-unet-gradient": unet_gradient,
    "attention-unet-maps-gradient": unet_maps_gradient,
    "attention-dit-time": dit_time,
    "nearest-code-time": nearest_code_time,
    "nearest-code-faiss": nearest_code_faiss,
    "nearest-code-memory": nearest_code_memory,
    "scalar-quantize-time": scalar_quantize_time,
    "ranking-time": ranking_time,
    "ranking-memory": ranking_memory,
    "sinkhorn-time": sinkhorn_time,
    **graph_claims.CLAIMS,
    **groupwise_claims.CLAIMS,
    **sparse_claims.CLAIMS,
}
