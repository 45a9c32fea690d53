"""Settings of erasers that suit a model better than those of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unweave.diffusion_core.embedded import embedded_world

_OBJECT_PROMPTS = (
    "{}",
    "a {}",
    "a {} on a white background",
    "a {} on a blue background, noto style",
    "a {}, fluent style, gray background",
    "twemoji style picture of a {} on red",
    "a {}, openmoji style",
)
_STYLE_PROMPTS = (
    "a cat face, {} style",
    "a rocket on a blue background, {} style",
    "a pizza, {} style, white background",
    "{} style picture of a guitar on pink",
    "a penguin, {} style",
    "a sunflower on a gray background, {} style",
)

_FEW_SHOT = {
    "epochs": 48,
    "lr": 1e-3,
    "num_images": 16,
    "batch_size": 8,
    "preserve_weight": 40.0,
    "guidance_scale": 4.0,
    "num_inference_steps": 25,
}
_UCE = {
    "scale_to_norm": True,
    "positions": "from-last-subject-token",
    "regularisation": 0.05,
}

RECIPES: dict[str, dict[str, dict[str, dict[str, Any]]]] = {
    "emoji-world": {
        "few-shot": {
            "object": {**_FEW_SHOT, "templates": _OBJECT_PROMPTS},
            "style": {**_FEW_SHOT, "templates": _STYLE_PROMPTS},
        },
        "uce": {
            "object": {**_UCE, "templates": ("a {}",)},
            "style": {**_UCE, "templates": _STYLE_PROMPTS},
        },
        "esd": {
            "object": {"lr": 1e-4, "num_steps": 100, "templates": ("a {}",)},
            "style": {"lr": 1e-4, "num_steps": 100, "templates": _STYLE_PROMPTS},
        },
    },
}
"""Settings that differ from the papers', {model: {method: {kind of concept: settings}}}."""


def _embedded_anchors(kind: str) -> tuple[str, ...]:
    """Return prompts of emoji-world: the empty one, each concept and, for styles, some in each."""
    world = embedded_world()
    plain = ("", *map(world.phrase, world.trained))
    if kind == "object":
        return plain
    styled = [f"{prompt}, {{}} style" for prompt in plain[1::8]]
    return (*plain, *(prompt.format(style) for prompt in styled for style in world.styles))


ANCHORS: dict[str, Callable[[str], tuple[str, ...]]] = {"emoji-world": _embedded_anchors}
"""Prompts that a closed form leaves as they are, by model, for a kind of concept."""
