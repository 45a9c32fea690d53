"""Several concepts erased in one go: closed forms with the rows of all of them in one solve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unweave.diffusion_core.errors import PromptError, SelectionError
from unweave.diffusion_core.parameters import select_parameters
from unweave.diffusion_core.pipelines import Pipeline, base_model_hash
from unweave.diffusion_core.prompts import encode_prompts, fill, mentions
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.closed_form import ClosedFormEdit, closed_form_edit
from unweave.erasure.protocol import (
    Eraser,
    Erasure,
    ErasureRequest,
    base_name,
    check_pipeline,
)
from unweave.erasure.uce import CLIP_SQUARED_NORM, UCE, UCEConfig, last_subject_token

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

GUIDES = {"object": "", "style": "art"}
"""What closed forms put in the place of a concept by its kind when a request does not say."""

_ENCODING_BATCH = 64


@runtime_checkable
class JointEraser(Protocol):
    """An eraser that can erase the concepts of several requests together."""

    def erase_many(
        self,
        pipe: Pipeline,
        requests: Sequence[ErasureRequest],
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Work out one erasure of all `requests`; `pipe` is left bit-identical."""
        ...


def erase_many(
    pipe: Pipeline,
    requests: Sequence[ErasureRequest],
    eraser: Eraser | JointEraser,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Erasure:
    """Erase the concepts of all `requests` together by UCE or an eraser that has `erase_many`.

    One solve knows all concepts, so none moves the keys and values that another put in place, as
    erasures made one by one and added up do. The request of the result names all targets. Raises
    `SelectionError` for erasers of one concept at a time and `PromptError` for requests that
    contradict one another.

    >>> from unweave.diffusion_core.testing import tiny_pipeline
    >>> requests = [ErasureRequest("cat", "dog"), ErasureRequest("rocket", "tree")]
    >>> erase_many(tiny_pipeline(), requests, UCE()).request.target
    'cat; rocket'
    """
    check_pipeline(pipe)
    if isinstance(eraser, JointEraser):
        return eraser.erase_many(pipe, requests, seed=seed, progress=progress)
    if not isinstance(eraser, UCE):
        raise SelectionError(
            f"{eraser.name!r} erases one concept at a time: apply several of its erasures one "
            "after another, which adds them up, or use uce, rece or mace"
        )
    edit = closed_form_rows(pipe, requests, eraser.config).solve(eraser.config)
    return closed_form_erasure(pipe, requests, edit, method=eraser.name, config=eraser.config)


@dataclass(frozen=True)
class ClosedFormRows:
    """The inputs of a closed form: `sources` go where `targets` (edits, width) are, others stay.

    `preserved` is (n, width), None for none.
    """

    sources: Tensor
    targets: Tensor
    preserved: Tensor | None

    @property
    def scale(self) -> float:
        """The mean squared norm of the sources relative to that of states of CLIP ViT-L/14."""
        return self.sources.square().sum(1).mean().item() / CLIP_SQUARED_NORM

    def solve(self, config: UCEConfig) -> ClosedFormEdit:
        """Return UCE's edit with the weights of `config`."""
        scale = self.scale if config.scale_to_norm else 1.0
        return closed_form_edit(
            self.sources,
            self.targets,
            self.preserved,
            regularisation=config.regularisation * scale,
            edit_scale=config.erase_scale,
            preserve_scale=config.preserve_scale,
        )


def closed_form_rows(
    pipe: Pipeline, requests: Sequence[ErasureRequest], config: UCEConfig
) -> ClosedFormRows:
    """Return what `UCE` with `config` would move and keep for each of the requests, together.

    Prompts are encoded in batches: a thousand concepts are no more than a few calls.
    """
    combined_request(requests)
    concepts = [(request.target, guide_of(request)) for request in requests]
    texts = [
        (template, text)
        for target, guide in concepts
        for template in config.templates
        for text in (target, guide)
    ]
    runs = _runs(pipe, texts, config.positions)
    pairs = [
        (source[: len(target)], target[: len(source)])
        for source, target in zip(runs[::2], runs[1::2], strict=True)
    ]
    kept = dict.fromkeys(concept for request in requests for concept in request.preserve)
    preserved = _runs(
        pipe,
        [(template, concept) for concept in kept for template in config.templates],
        config.positions,
    )
    preserved += kept_states(pipe, config.anchors, requests)
    return ClosedFormRows(
        torch.cat([source for source, _ in pairs]),
        torch.cat([target for _, target in pairs]),
        torch.cat(preserved) if preserved else None,
    )


def guide_of(request: ErasureRequest) -> str:
    """Return what takes the place of the target: the replacement, or `GUIDES` by its kind."""
    return GUIDES[request.kind] if request.replacement is None else request.replacement


def kept_states(
    pipe: Pipeline, prompts: Sequence[str], requests: Sequence[ErasureRequest]
) -> list[Tensor]:
    """Return all states (n, width) of the prompts that name no target, one tensor or none."""
    kept = [text for text in prompts if not any(mentions(text, r.target) for r in requests)]
    return [encode_in_batches(pipe, kept).flatten(0, 1)] if kept else []


@torch.no_grad()
def encode_in_batches(pipe: Pipeline, prompts: Sequence[str]) -> Tensor:
    """Return the states (n, tokens, width) of any number of prompts, without gradients."""
    starts = range(0, len(prompts), _ENCODING_BATCH)
    return torch.cat(
        [encode_prompts(pipe, prompts[start : start + _ENCODING_BATCH]) for start in starts]
    )


def written(template: str, concept: str) -> str:
    """Return the prompt of a concept, or what is left of the template without one."""
    if concept.strip():
        return fill(template, concept)
    return " ".join(template.replace("{}", "").split())


def combined_request(requests: Sequence[ErasureRequest]) -> ErasureRequest:
    """Return one request that names the targets of all: itself for a single one.

    Raises `PromptError` when there is none, when a target comes twice, or when one request keeps
    what another erases.

    >>> combined_request([ErasureRequest("cat", "dog"), ErasureRequest("car", "dog")])
    ErasureRequest(target='cat; car', replacement='dog', preserve=(), kind='object')
    """
    if not requests:
        raise PromptError("`requests` must hold at least one request, got none")
    if len(requests) == 1:
        return requests[0]
    targets = [request.target.strip().casefold() for request in requests]
    kept = tuple(dict.fromkeys(concept for request in requests for concept in request.preserve))
    for target in targets:
        if targets.count(target) > 1:
            raise PromptError(f"`requests` erase {target!r} more than once")
    for concept in kept:
        if concept.strip().casefold() in targets:
            raise PromptError(f"one of `requests` erases {concept!r} and another preserves it")
    replacements = {request.replacement for request in requests}
    return ErasureRequest(
        "; ".join(request.target for request in requests),
        replacement=replacements.pop() if len(replacements) == 1 else None,
        preserve=kept,
        kind=requests[0].kind,
    )


def closed_form_erasure(
    pipe: Pipeline,
    requests: Sequence[ErasureRequest],
    edit: ClosedFormEdit,
    *,
    method: str,
    config: DataclassInstance,
    notes: Mapping[str, Any] | None = None,
) -> Erasure:
    """Return the edit of all key and value matrices as an erasure that is exactly a LoRA."""
    slim = compact(edit)
    changes = {name: slim.low_rank(weight) for name, weight in key_value_weights(pipe).items()}
    settings = {**asdict(config), **about(requests), **(notes or {})}
    meta = DeltaMeta(base_model_hash(pipe), method, settings)
    return Erasure(WeightDelta({"unet": changes}, meta), combined_request(requests))


def about(requests: Sequence[ErasureRequest]) -> dict[str, Any]:
    """Return what a manifest says of several requests; of one the erasure itself says it."""
    if len(requests) == 1:
        return {}
    said = ("target", "replacement", "kind")
    return {"requests": [{name: getattr(request, name) for name in said} for request in requests]}


def key_value_weights(pipe: Pipeline) -> dict[str, Tensor]:
    """Return the matrices of keys and values of cross-attention by their name in the base model."""
    weights = select_parameters(pipe.unet, "cross-attention-kv")
    return {base_name(name): weight for name, weight in weights.items() if weight.ndim == 2}


def compact(edit: ClosedFormEdit) -> ClosedFormEdit:
    """Return the same edit in at most `width` rows, however many states were edited.

    All matrices are multiplied by I + difference^T down. When that has more rows than columns, its
    singular vectors take their place, to the precision of float32.
    """
    if len(edit.down) <= edit.down.shape[1]:
        return edit
    left, values, right = torch.linalg.svd(edit.difference.T @ edit.down)
    rank = max(1, int((values > values[0] * torch.finfo(torch.float32).eps).sum()))
    return ClosedFormEdit((left[:, :rank] * values[:rank]).T, right[:rank])


def _runs(pipe: Pipeline, texts: Sequence[tuple[str, str]], positions: str) -> list[Tensor]:
    """Return for each (template, concept) the states (n, width) that stand for the concept."""
    if not texts:
        return []
    prompts = [written(template, concept) for template, concept in texts]
    different = list(dict.fromkeys(prompts))
    states = dict(zip(different, encode_in_batches(pipe, different), strict=True))
    runs = []
    for prompt, (_, concept) in zip(prompts, texts, strict=True):
        last = last_subject_token(pipe, prompt, concept)
        stop = last + 1 if positions == "last-subject-token" else None
        runs.append(states[prompt][last:stop])
    return runs
