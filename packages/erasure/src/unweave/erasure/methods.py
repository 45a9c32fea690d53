"""Erasers by name, with settings that suit a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Literal

from unweave.diffusion_core.errors import SelectionError
from unweave.erasure.all_but_one import AllButOne
from unweave.erasure.co_erasing import CoErasing
from unweave.erasure.concept_ablation import ConceptAblation
from unweave.erasure.doco import DoCo
from unweave.erasure.esd import ESD
from unweave.erasure.few_shot import FewShotErasing
from unweave.erasure.mace import MACE
from unweave.erasure.protocol import KINDS, Eraser
from unweave.erasure.rece import RECE
from unweave.erasure.recipes import ANCHORS, RECIPES
from unweave.erasure.spm import SPM
from unweave.erasure.uce import UCE

METHODS: dict[str, type[Eraser]] = {
    "few-shot": FewShotErasing,
    "doco": DoCo,
    "co-erasing": CoErasing,
    "all-but-one": AllButOne,
    "esd": ESD,
    "uce": UCE,
    "rece": RECE,
    "concept-ablation": ConceptAblation,
    "spm": SPM,
    "mace": MACE,
}
"""Eraser classes by name: the systems of four papers, then the baselines of the field."""

READ_IMAGES = ("few-shot", "co-erasing", "mace")
"""Erasers that learn from `ErasureRequest.images` when there are some."""

NEED_REPLACEMENT = ("doco", "concept-ablation")
"""Erasers that cannot do without `ErasureRequest.replacement`, their anchor."""


def make_eraser(
    name: str,
    model: str | None = None,
    kind: Literal["object", "style"] = "object",
    **settings: Any,
) -> Eraser:
    """Return the eraser `name` with the recipe of `model`, if any, and `settings` on top.

    A recipe is for the `kind` of concept that will be asked for; that of a closed form keeps the
    prompts of `ANCHORS`. Without a `model`, or for one without a recipe, settings are the papers'
    defaults, which suit Stable Diffusion 1.x. Raises `SelectionError` for unknown names, kinds and
    settings.

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
