"""Nearest codes of a codebook, and quantization to them."""

from unweave.kernels.codes.functions import (
    Quantized,
    nearest_code,
    scalar_quantize,
    update_codebook,
    vector_quantize,
)

__all__ = ["Quantized", "nearest_code", "scalar_quantize", "update_codebook", "vector_quantize"]
