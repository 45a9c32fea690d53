"""See, cut and steer attention in diffusers pipelines."""

from unweave.attention_tools.a_star import AStar, AStarConfig
from unweave.attention_tools.anagram import AVERAGING, Anagram, AnagramConfig, AnagramMTL
from unweave.attention_tools.attend_and_excite import AttendAndExcite, AttendAndExciteConfig
from unweave.attention_tools.capture import MapReader, capture_attention
from unweave.attention_tools.editing import edit_attention
from unweave.attention_tools.errors import (
    AttentionError,
    BudgetError,
    GuidanceError,
    MapError,
    TokenError,
    UnsupportedLayerError,
    ViewError,
)
from unweave.attention_tools.guidance import DenoisingStep, guide_latents
from unweave.attention_tools.interception import AttentionCall, intercept_attention
from unweave.attention_tools.latent_update import LatentUpdate
from unweave.attention_tools.layers import AttentionLayer, attention_layers, select_layers
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.masks import (
    disjoint_masks,
    otsu_threshold,
    refine_by_self_attention,
    smooth,
    to_mask,
)
from unweave.attention_tools.noisy_clip import (
    NoisyCLIP,
    NoisyCLIPConfig,
    NoisyCLIPScorer,
    train_noisy_clip,
)
from unweave.attention_tools.overlap import iou, jensen_shannon, min_sum_ratio, soft_iou
from unweave.attention_tools.pictures import animate_maps
from unweave.attention_tools.prompt_to_prompt import (
    LocalBlend,
    PromptToPrompt,
    PromptToPromptConfig,
)
from unweave.attention_tools.scores import CLIPScorer, Scorer
from unweave.attention_tools.subjects import find_subjects
from unweave.attention_tools.t2i_zero import (
    T2IZero,
    T2IZeroConfig,
    correction_by_similarities,
)
from unweave.attention_tools.tokens import TokenSpans, find_tokens
from unweave.attention_tools.upscaling import UPSCALING, AnagramUpscaler
from unweave.attention_tools.views import VIEWS, View, get_view

__version__ = "0.0.1"

__all__ = [
    "AVERAGING",
    "UPSCALING",
    "VIEWS",
    "AStar",
    "AStarConfig",
    "Anagram",
    "AnagramConfig",
    "AnagramMTL",
    "AnagramUpscaler",
    "AttendAndExcite",
    "AttendAndExciteConfig",
    "AttentionCall",
    "AttentionError",
    "AttentionLayer",
    "AttentionMaps",
    "BudgetError",
    "CLIPScorer",
    "DenoisingStep",
    "GuidanceError",
    "LatentUpdate",
    "LocalBlend",
    "MapError",
    "MapReader",
    "NoisyCLIP",
    "NoisyCLIPConfig",
    "NoisyCLIPScorer",
    "PromptToPrompt",
    "PromptToPromptConfig",
    "Scorer",
    "T2IZero",
    "T2IZeroConfig",
    "TokenError",
    "TokenSpans",
    "UnsupportedLayerError",
    "View",
    "ViewError",
    "animate_maps",
    "attention_layers",
    "capture_attention",
    "correction_by_similarities",
    "disjoint_masks",
    "edit_attention",
    "find_subjects",
    "find_tokens",
    "get_view",
    "guide_latents",
    "intercept_attention",
    "iou",
    "jensen_shannon",
    "min_sum_ratio",
    "otsu_threshold",
    "refine_by_self_attention",
    "select_layers",
    "smooth",
    "soft_iou",
    "to_mask",
    "train_noisy_clip",
]
