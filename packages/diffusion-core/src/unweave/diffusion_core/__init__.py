"""What every unweave package builds on: pipelines, artifacts, training, metrics and reports."""

from unweave.diffusion_core.changes import LowRank
from unweave.diffusion_core.checkpoints import TrainingState
from unweave.diffusion_core.clip import clip_features, token_embedding_override
from unweave.diffusion_core.denoiser import Denoiser, Prediction, classifier_free
from unweave.diffusion_core.errors import (
    ArtifactError,
    ImageError,
    NonFiniteError,
    PipelineError,
    PromptError,
    SelectionError,
    UnweaveError,
)
from unweave.diffusion_core.files import (
    atomic_folder,
    atomic_write_bytes,
    folder_lock,
    load_tensors,
    read_manifest,
    safe_name,
    save_tensors,
    sha256_of,
    write_manifest,
)
from unweave.diffusion_core.keys import (
    canonical_text_encoder_key,
    native_text_encoder_key,
    to_kohya_key,
)
from unweave.diffusion_core.latents import encode_images, load_images
from unweave.diffusion_core.lora import add_lora, load_lora_factors, save_lora
from unweave.diffusion_core.metrics import (
    bootstrap_interval,
    clip_score,
    fid,
    kid,
    perceptual_distance,
    wilson_interval,
)
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.parameters import (
    ROLES,
    assert_untouched,
    fingerprint,
    select_parameters,
    train_only,
)
from unweave.diffusion_core.pipelines import MODELS, base_model_hash, generate, load_pipeline
from unweave.diffusion_core.prompts import (
    OBJECT_TEMPLATES,
    STYLE_TEMPLATES,
    PromptStates,
    encode_conditions,
    encode_prompts,
    fill,
    subject_token_positions,
)
from unweave.diffusion_core.report import Report, image_grid
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.diffusion_core.tokens import add_tokens, load_tokens, save_token, train_token_rows
from unweave.diffusion_core.training import batch_indices, run_training
from unweave.diffusion_core.trajectories import partial_trajectory
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta

__version__ = "0.1.0"

__all__ = [
    "MODELS",
    "OBJECT_TEMPLATES",
    "ROLES",
    "STYLE_TEMPLATES",
    "ArtifactError",
    "DeltaMeta",
    "Denoiser",
    "ImageError",
    "LowRank",
    "NonFiniteError",
    "PipelineError",
    "Prediction",
    "PromptError",
    "PromptStates",
    "Report",
    "SelectionError",
    "TrainingState",
    "UnweaveError",
    "WeightDelta",
    "add_lora",
    "add_tokens",
    "assert_untouched",
    "atomic_folder",
    "atomic_write_bytes",
    "base_model_hash",
    "batch_indices",
    "bootstrap_interval",
    "canonical_text_encoder_key",
    "classifier_free",
    "clip_features",
    "clip_score",
    "denoising_loss",
    "encode_conditions",
    "encode_images",
    "encode_prompts",
    "fid",
    "fill",
    "fingerprint",
    "folder_lock",
    "frozen_teacher",
    "generate",
    "image_grid",
    "kid",
    "load_images",
    "load_lora_factors",
    "load_pipeline",
    "load_tensors",
    "load_tokens",
    "native_text_encoder_key",
    "partial_trajectory",
    "perceptual_distance",
    "read_manifest",
    "run_training",
    "safe_name",
    "save_lora",
    "save_tensors",
    "save_token",
    "select_parameters",
    "sha256_of",
    "subject_token_positions",
    "tiny_pipeline",
    "tiny_xl_pipeline",
    "to_kohya_key",
    "token_embedding_override",
    "train_only",
    "train_token_rows",
    "wilson_interval",
    "write_manifest",
]
