"""RECE (arXiv 2407.12383): erase again what still brings an erased concept back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unweave.diffusion_core.errors import SelectionError
from unweave.diffusion_core.pipelines import Pipeline
from unweave.erasure.closed_form import ClosedFormEdit, closed_form_edit
from unweave.erasure.evaluation import NEUTRAL_PROMPTS
from unweave.erasure.many import (
    closed_form_erasure,
    closed_form_rows,
    encode_in_batches,
    guide_of,
    kept_states,
    key_value_weights,
    written,
)
from unweave.erasure.protocol import Erasure, ErasureRequest, check_number, check_pipeline
from unweave.erasure.uce import UCEConfig

_RIDGES = {"object": 0.1, "style": 1e-3}
_SAME = 1e-5


@dataclass(frozen=True)
class RECEConfig(UCEConfig):
    """Settings of RECE: those of UCE for the first edit, and those of the iterations after it.

    `ridge` is nu in the search for the states that bring the concept back; None takes the paper's
    0.1 for objects and 0.001 for styles (the paper has 0.001 for objects that are hard to erase
    too, and 0.1 with three iterations for nudity). `iteration_regularisation` is its lambda_2 and
    `iteration_preserve_scale` its lambda_1. `num_iterations` is the most that are made: none
    follows once the relative residual of the concept is at least `enough_residual`, and one that
    would move the states of `drift_prompts` by more than `max_drift` relative to their norm is
    not taken. None switches either rule off.
    """

    num_iterations: int = 1
    ridge: float | None = None
    iteration_regularisation: float = 0.1
    iteration_preserve_scale: float = 0.1
    enough_residual: float | None = None
    max_drift: float | None = None
    drift_prompts: tuple[str, ...] = NEUTRAL_PROMPTS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "drift_prompts", tuple(self.drift_prompts))
        check_number("num_iterations", self.num_iterations, "at least 0", lambda x: x >= 0)
        check_number(
            "iteration_regularisation",
            self.iteration_regularisation,
            "positive",
            lambda x: x > 0,
        )
        check_number(
            "iteration_preserve_scale",
            self.iteration_preserve_scale,
            "at least 0",
            lambda x: x >= 0,
        )
        for name in ("ridge", "enough_residual", "max_drift"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "positive or None", lambda x: x > 0)


class RECE:
    """Erase as UCE does, then find the states that still give the concept and erase them too.

    All matrices share the states that are found, so every iteration is one solve, and the sum of
    all edits is exactly a LoRA. The artifact's settings hold under "iterations" what each one did:
    the residual, which says how far the concept can still be reached, and the drift of other
    prompts. No detector decides when to stop.

    >>> RECE(RECEConfig(num_iterations=3)).config.iteration_preserve_scale
    0.1
    """

    name: ClassVar[str] = "rece"
    config_class: ClassVar[type[RECEConfig]] = RECEConfig

    def __init__(self, config: RECEConfig | None = None) -> None:
        """Keep the settings."""
        self.config = config or RECEConfig()

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Solve for the edits; `pipe` stays as it is, and `seed` and `progress` have no effect."""
        return self.erase_many(pipe, [request])

    def erase_many(
        self,
        pipe: Pipeline,
        requests: Sequence[ErasureRequest],
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Erase the concepts of all requests together, in each iteration too."""
        check_pipeline(pipe)
        edit, iterations = self._iterate(pipe, requests)
        return closed_form_erasure(
            pipe,
            requests,
            edit,
            method=self.name,
            config=self.config,
            notes={"iterations": iterations},
        )

    def _iterate(
        self, pipe: Pipeline, requests: Sequence[ErasureRequest]
    ) -> tuple[ClosedFormEdit, list[dict[str, float]]]:
        config = self.config
        rows = closed_form_rows(pipe, requests, config)
        scale = rows.scale if config.scale_to_norm else 1.0
        pairs = [
            (written(template, request.target), written(template, guide_of(request)))
            for request in requests
            for template in config.templates
        ]
        concept, guide = (
            encode_in_batches(pipe, prompts).flatten(0, 1).double()
            for prompts in zip(*pairs, strict=True)
        )
        ridges = [_RIDGES[r.kind] if config.ridge is None else config.ridge for r in requests]
        ridge = torch.tensor(ridges).repeat_interleave(len(concept) // len(requests)).double()
        # States before the concept are those before the guide: there is nothing to bring back.
        own = (concept - guide).norm(dim=1) > _SAME * guide.norm(dim=1)
        concept, guide, ridge = concept[own], guide[own], ridge[own]
        others = kept_states(pipe, config.drift_prompts, requests)
        gram = key_value_gram(list(key_value_weights(pipe).values()))

        def measured(edit: ClosedFormEdit) -> tuple[Tensor, dict[str, float]]:
            found = derived_states(gram, edit, concept, ridge)
            measures = {"residual": relative_residual(gram, edit, found, concept)}
            for name, states in (("drift", others), ("preserved_drift", [rows.preserved])):
                if states and states[0] is not None:
                    measures[name] = relative_drift(gram, edit, states[0])
            return found, measures

        edit = rows.solve(config)
        found, measures = measured(edit)
        history = [measures]
        for _ in range(config.num_iterations):
            if config.enough_residual is not None and (
                history[-1]["residual"] >= config.enough_residual
            ):
                break
            step = closed_form_edit(
                found,
                guide,
                rows.preserved,
                regularisation=config.iteration_regularisation * scale,
                preserve_scale=config.iteration_preserve_scale,
            )
            candidate = composed(edit, step)
            found, measures = measured(candidate)
            if config.max_drift is not None and measures.get("drift", 0.0) > config.max_drift:
                break
            edit = candidate
            history.append(measures)
        return edit, history


def key_value_gram(weights: Sequence[Tensor]) -> Tensor:
    """Return the sum of W^T W over matrices (out, width), (width, width) in float64 on the CPU.

    Raises `SelectionError` when they differ in width.
    """
    if len({weight.shape[-1] for weight in weights}) != 1:
        raise SelectionError(
            "`weights` must read states of one width, got matrices "
            f"{sorted({tuple(weight.shape) for weight in weights})}"
        )
    matrices = (weight.detach().cpu().double() for weight in weights)
    return torch.stack([matrix.T @ matrix for matrix in matrices]).sum(0)


def derived_states(
    gram: Tensor, edit: ClosedFormEdit, concept: Tensor, ridge: float | Tensor
) -> Tensor:
    """Return the states whose edited keys and values come closest to those of `concept` before.

    c' = (nu I + sum W'^T W')^-1 (sum W'^T W) c, the minimum of sum ||W' c' - W c||^2 + nu ||c'||^2
    over all matrices (the paper's derived embedding). `gram` is sum W^T W, `concept` (n, width);
    `ridge` is nu, one number or one for each state (n,).
    """
    edited = _edited_gram(gram, edit)
    projected = concept.double() @ gram
    wanted = projected + (projected @ edit.difference.T) @ edit.down
    values, vectors = torch.linalg.eigh(edited)
    shrink = values.clamp_min(0) + torch.as_tensor(ridge, dtype=torch.float64).reshape(-1, 1)
    solved: Tensor = (wanted @ vectors / shrink) @ vectors.T
    return solved


def relative_residual(
    gram: Tensor, edit: ClosedFormEdit, derived: Tensor, concept: Tensor
) -> float:
    """Return ||W' c' - W c|| / ||W c|| over all matrices and states (n, width)."""
    concept = concept.double()
    reached = derived + (derived @ edit.down.T) @ edit.difference
    return _norm_ratio(gram, reached - concept, concept)


def relative_drift(gram: Tensor, edit: ClosedFormEdit, states: Tensor) -> float:
    """Return ||(W' - W) c|| / ||W c|| over all matrices and states (n, width)."""
    states = states.detach().cpu().double()
    return _norm_ratio(gram, (states @ edit.down.T) @ edit.difference, states)


def composed(first: ClosedFormEdit, second: ClosedFormEdit) -> ClosedFormEdit:
    """Return the one edit that does `first` and then, to the matrices it gives, `second`.

    W (I + D1^T B1)(I + D2^T B2) = W + W [D1^T B1 + (D2 + (D2 B1^T) D1)^T B2].
    """
    carried = second.difference + (second.difference @ first.down.T) @ first.difference
    return ClosedFormEdit(
        torch.cat([first.difference, carried]), torch.cat([first.down, second.down])
    )


def _edited_gram(gram: Tensor, edit: ClosedFormEdit) -> Tensor:
    """Return sum W'^T W' = M^T (sum W^T W) M for W' = W M, M = I + difference^T down."""
    left = gram + edit.down.T @ (edit.difference @ gram)
    return left + (left @ edit.difference.T) @ edit.down


def _norm_ratio(gram: Tensor, difference: Tensor, reference: Tensor) -> float:
    squares = [((states @ gram) * states).sum().clamp_min(0) for states in (difference, reference)]
    return (squares[0] / squares[1]).sqrt().item()
