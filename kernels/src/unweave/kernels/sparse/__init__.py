"""Sparse codes: the largest activations of a row or a batch, and products with a dictionary."""

from unweave.kernels.sparse.functions import (
    CsrCodes,
    TopK,
    batch_topk,
    sparse_decode,
    sparse_encode,
    threshold_sparse,
    topk_sparse,
    update_threshold,
)

__all__ = [
    "CsrCodes",
    "TopK",
    "batch_topk",
    "sparse_decode",
    "sparse_encode",
    "threshold_sparse",
    "topk_sparse",
    "update_threshold",
]
