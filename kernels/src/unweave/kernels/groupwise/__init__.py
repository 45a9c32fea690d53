"""Weights in 8 or 4 bits with a scale for each group, and products with them."""

from unweave.kernels.groupwise.functions import (
    GroupQuantized,
    dequantize_groupwise,
    quantize_groupwise,
    quantized_matmul,
)

__all__ = ["GroupQuantized", "dequantize_groupwise", "quantize_groupwise", "quantized_matmul"]
