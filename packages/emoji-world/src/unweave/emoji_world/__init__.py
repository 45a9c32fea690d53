"""A small world of open vector art with known factors, and the models trained on it."""

from unweave.emoji_world.models import (
    ClipScorer,
    ModelNotShippedError,
    load_clip,
    load_pipeline,
    load_recogniser,
    pipeline_path,
)
from unweave.emoji_world.recogniser import Recogniser
from unweave.emoji_world.scenes import (
    FACTOR_NAMES,
    Overlay,
    Scene,
    SceneDataset,
    SceneObject,
    SceneSpec,
    caption,
    compose,
    crossed_specs,
    random_spec,
)
from unweave.emoji_world.world import Concept, World

__version__ = "0.1.0"
__all__ = [
    "FACTOR_NAMES",
    "ClipScorer",
    "Concept",
    "ModelNotShippedError",
    "Overlay",
    "Recogniser",
    "Scene",
    "SceneDataset",
    "SceneObject",
    "SceneSpec",
    "World",
    "caption",
    "compose",
    "crossed_specs",
    "load_clip",
    "load_pipeline",
    "load_recogniser",
    "pipeline_path",
    "random_spec",
]
