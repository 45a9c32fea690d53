"""What unweave-kernels says about products with graphs, measured beside torch's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
from ratios import at_least
from torch import Tensor

from claims_runner import Claim, Measure
from timing import median_seconds, peak_bytes
from unweave.kernels.graph import Transposed, edge_dot, transpose_csr, weighted_spmm

USERS, ITEMS, EDGES, WIDTH = 50_821, 57_440, 1_172_425, 32
"""Gowalla as DCCF trains on it."""


class Graph(NamedTuple):
    """A graph without repeated edges, whose degrees follow a power law, and its tables."""

    crow: Tensor
    row: Tensor
    col: Tensor
    weight: Tensor
    dense: Tensor
    grad: Tensor
    transpose: Transposed


Gradients = tuple[Tensor, Tensor, Tensor]
Peer = Callable[[Graph], Gradients]


def coo_time(seed: int, quick: bool) -> Claim:
    """Time forwards and backwards, against a COO product that learns its values."""
    return time_claim(
        "graph-coo-time",
        "A weighted graph product and both gradients are faster than through a COO tensor",
        "torch.sparse.mm of a coalesced COO tensor whose values need a gradient",
        coo,
        graph(seed, quick),
        5,
    )


def csr_time(seed: int, quick: bool) -> Claim:
    """Time forwards and backwards, against a CSR product that learns its values."""
    return time_claim(
        "graph-csr-time",
        "A weighted graph product and both gradients are faster than through a CSR tensor",
        "torch.sparse.mm of a CSR tensor whose values need a gradient",
        csr,
        graph(seed, quick),
        1.5,
    )


def best_csr_time(seed: int, quick: bool) -> Claim:
    """Time forwards and backwards with known transpose, against the best made of CSR parts."""
    return time_claim(
        "graph-csr-parts-time",
        "With the transpose known it is faster than the fastest made by hand of torch's CSR parts",
        "CSR product, sampled_addmm and CSR product with the transpose known, by hand",
        csr_by_hand,
        graph(seed, quick),
        1.5,
        known=True,
        repeats=7,
        note="both read a row of the table for each edge and product: memory sets the time",
    )


def gather_time(seed: int, quick: bool) -> Claim:
    """Time forwards and backwards, against a row for every edge."""
    return time_claim(
        "graph-gather-time",
        "A weighted graph product and both gradients are faster than by a row for every edge",
        "index, multiply and index_add",
        gather,
        graph(seed, quick),
        5,
        repeats=5,
    )


def gather_memory(seed: int, quick: bool) -> Claim:
    """Memory beyond the inputs and results, against a row for every edge."""
    g = graph(seed, quick)
    results = sum(part.numel() * part.element_size() for part in ours(g))
    usual, own = (peak_bytes(partial(work, g)) - results for work in (gather, ours))
    stored = g.col.numel() * g.dense.shape[1] * 4
    return at_least(
        "graph-memory",
        "A weighted graph product and both gradients take a fraction of the memory of edge rows",
        "index, multiply and index_add",
        f"{shape(g)}, bytes beyond results: {own / 2**20:.0f} MiB, edge rows {usual / 2**20:.0f} "
        f"MiB; one row for every edge is {stored / 2**20:.0f} MiB",
        usual / max(1, own),
        5,
    )


def dot_time(seed: int, quick: bool) -> Claim:
    """Time of dot products along edges and their gradients, against a row for every edge."""
    g = graph(seed, quick)
    u, v = g.grad.clone().requires_grad_(), g.dense.clone().requires_grad_()
    works = [
        lambda: torch.autograd.grad(edge_dot(u, v, g.row, g.col), (u, v), g.weight),
        lambda: torch.autograd.grad((u[g.row] * v[g.col]).sum(1), (u, v), g.weight),
    ]
    for one, other in zip(*(work() for work in works), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    own, usual = median_seconds(*works, repeats=3)
    return at_least(
        "edge-dot-time",
        "Dot products along edges and both gradients are faster than by rows for every edge",
        "index, multiply and sum",
        f"{shape(g)}; {1e3 * own:.0f} ms, edge rows {1e3 * usual:.0f} ms",
        usual / own,
        5,
    )


def time_claim(
    name: str,
    text: str,
    source: str,
    peer: Peer,
    g: Graph,
    limit: float,
    *,
    known: bool = False,
    repeats: int = 1,
    note: str = "",
) -> Claim:
    """How many times faster than `peer` we are, after both were found equal."""
    own_way = partial(ours, g, known=known)
    for one, other in zip(own_way(), peer(g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    own, theirs = median_seconds(own_way, partial(peer, g), repeats=repeats)
    setting = f"{shape(g)}, forward and backward; {1e3 * own:.0f} ms, peer {1e3 * theirs:.0f} ms"
    claim = at_least(name, text, source, setting, theirs / own, limit)
    return claim if claim.holds else replace(claim, note=note or claim.note)


def ours(g: Graph, *, known: bool = False) -> Gradients:
    """The product and its gradients, `known` with the transpose at hand."""
    weight, dense = leaves(g)
    transpose = g.transpose if known else None
    out = weighted_spmm(g.crow, g.col, weight, dense, transpose=transpose)
    return gradients(out, weight, dense, g)


def coo(g: Graph) -> Gradients:
    """The same through a COO tensor."""
    weight, dense = leaves(g)
    places, size = torch.stack([g.row, g.col]), (len(g.grad), len(g.dense))
    matrix = torch.sparse_coo_tensor(
        places, weight, size, is_coalesced=True, check_invariants=False
    )
    return gradients(torch.sparse.mm(matrix, dense), weight, dense, g)


def csr(g: Graph) -> Gradients:
    """The same through a CSR tensor."""
    weight, dense = leaves(g)
    return gradients(torch.sparse.mm(csr_tensor(g, weight), dense), weight, dense, g)


def csr_by_hand(g: Graph) -> Gradients:
    """The same of three CSR products."""
    matrix = csr_tensor(g, g.weight)
    of_weight = torch.sparse.sampled_addmm(matrix, g.grad, g.dense.T, beta=0.0).values()
    crow, col, order = g.transpose
    size = (len(g.dense), len(g.grad))
    transposed = torch.sparse_csr_tensor(
        crow, col, g.weight.index_select(0, order), size, check_invariants=False
    )
    return torch.sparse.mm(matrix, g.dense), of_weight, torch.sparse.mm(transposed, g.grad)


def gather(g: Graph) -> Gradients:
    """The same by a row for every edge."""
    weight, dense = leaves(g)
    out = torch.zeros_like(g.grad).index_add(0, g.row, weight[:, None] * dense[g.col])
    return gradients(out, weight, dense, g)


def csr_tensor(g: Graph, weight: Tensor) -> Tensor:
    """The graph as a CSR tensor, whose state in torch is beta: that warning is not news here."""
    size = (len(g.grad), len(g.dense))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(g.crow, g.col, weight, size, check_invariants=False)


def leaves(g: Graph) -> tuple[Tensor, Tensor]:
    """Weights and table that need gradients."""
    return g.weight.detach().requires_grad_(), g.dense.detach().requires_grad_()


def gradients(out: Tensor, weight: Tensor, dense: Tensor, g: Graph) -> Gradients:
    """The product and the gradients of the weights and the table."""
    return out.detach(), *torch.autograd.grad(out, (weight, dense), g.grad)


def shape(g: Graph) -> str:
    """The sizes of a graph."""
    return f"{len(g.grad)} x {len(g.dense)}, {len(g.col)} edges, {g.dense.shape[1]} features"


@cache
def graph(seed: int, quick: bool) -> Graph:
    """A graph of Gowalla's size, or a twentieth of it."""
    part = 20 if quick else 1
    users, items, edges = USERS // part, ITEMS // part, EDGES // part
    generator = torch.Generator().manual_seed(seed)
    shares = [torch.rand(count, generator=generator).pow(-1 / 1.5) for count in (users, items)]
    ends = [
        torch.searchsorted(
            share.cumsum(0) / share.sum(), torch.rand(edges * 3 // 2, generator=generator)
        ).clamp_(max=len(share) - 1)
        for share in shares
    ]
    places = (ends[0] * items + ends[1]).unique()
    chosen = places[torch.randperm(len(places), generator=generator)[:edges].sort().values]
    if len(chosen) < edges:
        raise AssertionError(f"only {len(chosen)} different edges were drawn")
    row, col = chosen // items, chosen % items
    crow = torch.zeros(users + 1, dtype=torch.int64)
    crow[1:] = row.bincount(minlength=users).cumsum(0)
    weight = torch.rand(edges, generator=generator)
    dense = torch.randn(items, WIDTH, generator=generator)
    grad = torch.randn(users, WIDTH, generator=generator)
    return Graph(crow, row, col, weight, dense, grad, transpose_csr(crow, col, items))


CLAIMS: dict[str, Measure] = {
    "graph-coo-time": coo_time,
    "graph-csr-time": csr_time,
    "graph-csr-parts-time": best_csr_time,
    "graph-gather-time": gather_time,
    "graph-memory": gather_memory,
    "edge-dot-time": dot_time,
}
