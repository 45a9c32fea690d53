"""Unified Concept Editing (arXiv 2308.14761): erase by a closed form in the cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.pipelines import Pipeline, base_model_hash
from unweave.diffusion_core.prompts import encode_prompts, fill, mentions, subject_token_positions
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.closed_form import ClosedFormEdit, closed_form_edit
from unweave.erasure.protocol import (
    Erasure,
    ErasureRequest,
    base_name,
    check_number,
    check_pipeline,
)

UCE_TEMPLATES = (
    "{}",
    "an image of {}",
    "a photo of {}",
    "a portrait of {}",
    "a picture of {}",
    "a painting of {}",
)
"""The plain concept and five expansions of it, for `UCEConfig.templates`."""

CLIP_SQUARED_NORM = 784.0
"""Squared norm of a token state of CLIP ViT-L/14, for which the paper's lambda was chosen."""

_GUIDES = {"object": "", "style": "art"}
_POSITIONS = ("last-subject-token", "from-last-subject-token")


@dataclass(frozen=True)
class UCEConfig:
    """Settings of UCE, by default those of the paper's current code.

    `regularisation` is lambda; with `scale_to_norm` it is multiplied by the mean ||c||^2 / 784 of
    the erased states, for text encoders whose states have another norm than those of CLIP
    ViT-L/14. `positions` says which states of a prompt enter: that of the subject's last token,
    or, as in the older code, all from there to the end of the prompt. With more `templates` (each
    with one `{}`) every concept enters once for each. `anchors` are prompts that keep all of their
    keys and values beside the concepts a request preserves; those that name its target are left
    out.
    """

    regularisation: float = 0.5
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    positions: Literal["last-subject-token", "from-last-subject-token"] = "last-subject-token"
    templates: tuple[str, ...] = ("{}",)
    anchors: tuple[str, ...] = ()
    scale_to_norm: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        object.__setattr__(self, "anchors", tuple(self.anchors))
        check_number("regularisation", self.regularisation, "positive", lambda x: x > 0)
        check_number("erase_scale", self.erase_scale, "positive", lambda x: x > 0)
        check_number("preserve_scale", self.preserve_scale, "at least 0", lambda x: x >= 0)
        if self.positions not in _POSITIONS:
            raise SelectionError(f"`positions` must be one of {_POSITIONS}, got {self.positions!r}")
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise SelectionError(
                f'`templates` must be texts with one "{{}}" each, got {self.templates!r}'
            )


class UCE:
    """Erase by moving the keys and values of a concept to those of a guide, in under a second.

    The guide is `request.replacement`, or else "" for objects and "art" for styles. Concepts in
    `request.preserve` keep their keys and values. The erasure is exactly a LoRA. In Stable
    Diffusion XL keys and values are those of both text encoders' states; the pooled state, which
    reaches the U-Net beside the cross-attention, is not edited.

    >>> UCE(UCEConfig(regularisation=0.1)).config.erase_scale
    1.0
    """

    name: ClassVar[str] = "uce"
    config_class: ClassVar[type[UCEConfig]] = UCEConfig

    def __init__(self, config: UCEConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or UCEConfig()

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Solve for the edit; `pipe` stays as it is, and `seed` and `progress` have no effect."""
        check_pipeline(pipe)
        weights = select_parameters(pipe.unet, "cross-attention-kv")
        edit = self.solve(pipe, request)
        changes = {
            base_name(name): edit.low_rank(weight)
            for name, weight in weights.items()
            if weight.ndim == 2
        }
        meta = DeltaMeta(base_model_hash(pipe), self.name, asdict(self.config))
        return Erasure(WeightDelta({"unet": changes}, meta), request)

    def solve(self, pipe: Pipeline, request: ErasureRequest) -> ClosedFormEdit:
        """Return the edit of `request` that the key and value matrices of all layers share."""
        config = self.config
        guide = _GUIDES[request.kind] if request.replacement is None else request.replacement
        pairs = [
            _aligned(
                subject_states(pipe, template, request.target, config.positions),
                subject_states(pipe, template, guide, config.positions),
            )
            for template in config.templates
        ]
        sources = torch.cat([source for source, _ in pairs])
        targets = torch.cat([target for _, target in pairs])
        preserved = [
            subject_states(pipe, template, concept, config.positions)
            for concept in request.preserve
            for template in config.templates
        ]
        preserved += anchor_states(pipe, config.anchors, request.target)
        scale = sources.square().sum(1).mean().item() / CLIP_SQUARED_NORM
        return closed_form_edit(
            sources,
            targets,
            torch.cat(preserved) if preserved else None,
            regularisation=config.regularisation * (scale if config.scale_to_norm else 1.0),
            edit_scale=config.erase_scale,
            preserve_scale=config.preserve_scale,
        )


def anchor_states(pipe: Pipeline, anchors: Sequence[str], target: str) -> list[Tensor]:
    """Return all states (n, width) of the prompts that do not name `target`, one tensor or none."""
    kept = [prompt for prompt in anchors if not mentions(prompt, target)]
    if not kept:
        return []
    with torch.no_grad():
        return [encode_prompts(pipe, kept).flatten(0, 1)]


def subject_states(pipe: Pipeline, template: str, subject: str, positions: str) -> Tensor:
    """Return the states (n, width) that stand for `subject` in a prompt; see `UCEConfig`.

    The subject may be empty, as the guide "" is: its last token is then the last before the end
    token, which in an empty prompt is the start token.
    """
    prompt = fill(template, subject) if subject.strip() else template.replace("{}", "").strip()
    with torch.no_grad():
        states = encode_prompts(pipe, [prompt])[0]
    last = last_subject_token(pipe, prompt, subject)
    return states[last : last + 1] if positions == "last-subject-token" else states[last:]


def last_subject_token(pipe: Pipeline, prompt: str, subject: str) -> int:
    """Return the position of the last token of `subject` in `prompt`, counting the start token."""
    if subject.strip():
        return subject_token_positions(pipe.tokenizer, prompt, subject)[-1]
    token_ids: Sequence[int] = pipe.tokenizer(prompt).input_ids
    return len(token_ids) - 2


def _aligned(sources: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cut two runs of states, which begin at the subjects' ends, to the same length."""
    count = min(len(sources), len(targets))
    return sources[:count], targets[:count]
