"""Attention that drops keys, and attention that also says where it looked."""

from unweave.kernels.attention.functions import (
    attention_maps,
    attention_product,
    attention_with_maps,
    masked_attention,
    self_attention_rows,
)

__all__ = [
    "attention_maps",
    "attention_product",
    "attention_with_maps",
    "masked_attention",
    "self_attention_rows",
]
