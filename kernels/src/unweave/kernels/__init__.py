"""Numeric routines for concept work: torch tensors in, torch tensors out."""

from unweave.kernels.attention import (
    attention_maps,
    attention_product,
    attention_with_maps,
    masked_attention,
    self_attention_rows,
)
from unweave.kernels.backends import BACKENDS, BackendError, use_backend

__version__ = "0.0.1"

__all__ = [
    "BACKENDS",
    "BackendError",
    "attention_maps",
    "attention_product",
    "attention_with_maps",
    "masked_attention",
    "self_attention_rows",
    "use_backend",
]
