"""Erasers by name, with settings that suit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.esd import ESD
from unweave.erasure.few_shot import FewShotErasing
from unweave.erasure.protocol import Eraser
from unweave.erasure.uce import UCE

METHODS: dict[str, type[FewShotErasing] | type[UCE] | type[ESD]] = {
    "few-shot": FewShotErasing,
    "uce": UCE,
    "esd": ESD,
}
"""Eraser classes by name."""

RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "emoji-world": {
        "few-shot": {"lr": 1e-3, "guidance_scale": 4.0, "num_inference_steps": 25},
        "uce": {"scale_to_norm": True, "positions": "from-last-subject-token"},
        "esd": {"lr": 1e-4, "num_steps": 100, "num_inference_steps": 25},
    },
}
"""Settings that differ from the papers', {model: {method: settings}}."""


def make_eraser(name: str, model: str | None = None, **settings: Any) -> Eraser:
    """Return the eraser `name` with the recipe of `model`, if any, and `settings` on top.

    Without a `model`, or for one without a recipe, settings are the papers' defaults, which suit
    Stable Diffusion 1.x. Raises `SelectionError` for unknown names and settings.

    >>> make_eraser("uce", regularisation=0.1).name
    'uce'
    """
    if name not in METHODS:
        raise SelectionError(f"`name` must be one of {tuple(METHODS)}, got {name!r}")
    recipe = RECIPES.get(model or "", {}).get(name, {})
    chosen: Mapping[str, Any] = {**recipe, **settings}
    method: Any = METHODS[name]
    known = [field.name for field in fields(method.config_class)]
    for setting in chosen:
        if setting not in known:
            near = get_close_matches(setting, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
            raise SelectionError(f"{name!r} has no setting {setting!r}{hint}")
    eraser: Eraser = method(method.config_class(**chosen))
    return eraser
