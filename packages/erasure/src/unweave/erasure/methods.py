"""Erasers by name, with settings that suit a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from unweave.diffusion_core.embedded import embedded_world
from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.esd import ESD
from unweave.erasure.few_shot import FewShotErasing
from unweave.erasure.protocol import KINDS, Eraser
from unweave.erasure.uce import UCE

METHODS: dict[str, type[FewShotErasing] | type[UCE] | type[ESD]] = {
    "few-shot": FewShotErasing,
    "uce": UCE,
    "esd": ESD,
}
"""Eraser classes by name."""

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


def make_eraser(
    name: str,
    model: str | None = None,
    kind: Literal["object", "style"] = "object",
    **settings: Any,
) -> Eraser:
    """Return the eraser `name` with the recipe of `model`, if any, and `settings` on top.

    A recipe is for the `kind` of concept that will be asked for; that of a closed form keeps the
    prompts of `ANCHORS`. Without a `model`, or for one
    without a recipe, settings are the papers' defaults, which suit Stable Diffusion 1.x. Raises
    `SelectionError` for unknown names, kinds and settings.

    >>> make_eraser("uce", regularisation=0.1).name
    'uce'
    """
    if name not in METHODS:
        raise SelectionError(f"`name` must be one of {tuple(METHODS)}, got {name!r}")
    if kind not in KINDS:
        raise SelectionError(f"`kind` must be one of {KINDS}, got {kind!r}")
    method: Any = METHODS[name]
    known = [field.name for field in fields(method.config_class)]
    recipe = dict(RECIPES.get(model or "", {}).get(name, {}).get(kind, {}))
    if model in ANCHORS and "anchors" in known:
        recipe["anchors"] = ANCHORS[model](kind)
    chosen: Mapping[str, Any] = {**recipe, **settings}
    for setting in chosen:
        if setting not in known:
            near = get_close_matches(setting, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise SelectionError(f"{name!r} has no setting {setting!r}{hint}")
    eraser: Eraser = method(method.config_class(**chosen))
    return eraser
