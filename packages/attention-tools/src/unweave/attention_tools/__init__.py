"""See, cut and steer attention in diffusers pipelines."""

from unweave.attention_tools.capture import MapReader, capture_attention
from unweave.attention_tools.errors import (
    AttentionError,
    BudgetError,
    GuidanceError,
    MapError,
    TokenError,
    UnsupportedLayerError,
)
from unweave.attention_tools.guidance import DenoisingStep, guide_latents
from unweave.attention_tools.interception import AttentionCall, intercept_attention
from unweave.attention_tools.layers import AttentionLayer, attention_layers, select_layers
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.tokens import TokenSpans, find_tokens

__version__ = "0.0.1"

__all__ = [
    "AttentionCall",
    "AttentionError",
    "AttentionLayer",
    "AttentionMaps",
    "BudgetError",
    "DenoisingStep",
    "GuidanceError",
    "MapError",
    "MapReader",
    "TokenError",
    "TokenSpans",
    "UnsupportedLayerError",
    "attention_layers",
    "capture_attention",
    "find_tokens",
    "guide_latents",
    "intercept_attention",
    "select_layers",
]
