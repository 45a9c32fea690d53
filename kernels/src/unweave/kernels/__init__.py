"""Numeric routines for concept work: torch tensors in, torch tensors out."""

from unweave.kernels.attention import (
    attention_maps,
    attention_product,
    attention_with_maps,
    masked_attention,
    self_attention_rows,
)
from unweave.kernels.backends import BACKENDS, BackendError, use_backend
from unweave.kernels.codes import (
    Quantized,
    nearest_code,
    scalar_quantize,
    update_codebook,
    vector_quantize,
)
from unweave.kernels.graph import Transposed, edge_dot, transpose_csr, weighted_spmm
from unweave.kernels.groupwise import (
    GroupQuantized,
    dequantize_groupwise,
    quantize_groupwise,
    quantized_matmul,
)
from unweave.kernels.ranking import streaming_logsumexp_topk
from unweave.kernels.sinkhorn import sinkhorn
from unweave.kernels.sparse import (
    CsrCodes,
    TopK,
    batch_topk,
    sparse_decode,
    sparse_encode,
    threshold_sparse,
    topk_sparse,
    update_threshold,
)

__version__ = "0.0.1"

__all__ = [
    "BACKENDS",
    "BackendError",
    "CsrCodes",
    "GroupQuantized",
    "Quantized",
    "TopK",
    "Transposed",
    "attention_maps",
    "attention_product",
    "attention_with_maps",
    "batch_topk",
    "dequantize_groupwise",
    "edge_dot",
    "masked_attention",
    "nearest_code",
    "quantize_groupwise",
    "quantized_matmul",
    "scalar_quantize",
    "self_attention_rows",
    "sinkhorn",
    "sparse_decode",
    "sparse_encode",
    "streaming_logsumexp_topk",
    "threshold_sparse",
    "topk_sparse",
    "transpose_csr",
    "update_codebook",
    "update_threshold",
    "use_backend",
    "vector_quantize",
    "weighted_spmm",
]
