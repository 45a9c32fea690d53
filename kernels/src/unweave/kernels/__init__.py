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
from unweave.kernels.ranking import streaming_logsumexp_topk
from unweave.kernels.sinkhorn import sinkhorn

__version__ = "0.0.1"

__all__ = [
    "BACKENDS",
    "BackendError",
    "Quantized",
    "attention_maps",
    "attention_product",
    "attention_with_maps",
    "masked_attention",
    "nearest_code",
    "scalar_quantize",
    "self_attention_rows",
    "sinkhorn",
    "streaming_logsumexp_topk",
    "update_codebook",
    "use_backend",
    "vector_quantize",
]
