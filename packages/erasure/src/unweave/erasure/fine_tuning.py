"""What erasers that fine-tune the U-Net share: the frame of a training and its usual targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.parameters import train_only
from unweave.diffusion_core.pipelines import Pipeline, base_model_hash, text_encoders
from unweave.diffusion_core.prompts import PromptStates
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta
from unweave.erasure.protocol import (
    Erasure,
    ErasureRequest,
    changes_since,
    check_pipeline,
    check_trainable,
    restored,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def fine_tune_unet(
    pipe: Pipeline,
    request: ErasureRequest,
    parameters: Mapping[str, nn.Parameter],
    train: Callable[[], list[float]],
    *,
    method: str,
    config: DataclassInstance,
    notes: Mapping[str, Any] | None = None,
) -> Erasure:
    """Let `train` change `parameters` of the U-Net and return what changed as an erasure.

    `train` returns the loss of each step. While it runs, only `parameters` have gradients; at the
    end, also after an error, `pipe` has its old weights back. The artifact's settings are `config`
    with `notes` on top. Raises `PipelineError` for pipelines that cannot be trained.
    """
    check_pipeline(pipe)
    check_trainable(parameters)
    base_hash = base_model_hash(pipe)
    with restored(parameters) as originals:
        with train_only([pipe.unet, *text_encoders(pipe).values(), pipe.vae], parameters):
            history = train()
        changes = changes_since(originals, parameters)
    meta = DeltaMeta(base_hash, method, {**asdict(config), **(notes or {})})
    return Erasure(WeightDelta({"unet": changes}, meta), request, history=history)


@torch.no_grad()
def negative_guidance(
    teacher: Denoiser,
    noisy: Tensor,
    t: Tensor,
    concept: Tensor | PromptStates,
    start: Tensor | PromptStates,
    empty: Tensor | PromptStates,
    eta: float,
) -> Tensor:
    """Return raw*(start) - eta [raw*(concept) - raw*(empty)] of a frozen model, (n, C, h, w).

    It is taken in the quantity the model predicts: noise as in the ESD paper (arXiv 2303.07345,
    eq. 6), or velocity, in which the same combination holds since its coefficients sum to one.
    `noisy` is (n, C, h, w), states are as in `Denoiser.predict`.
    """
    towards = teacher.predict(noisy, t, concept).raw - teacher.predict(noisy, t, empty).raw
    return teacher.predict(noisy, t, start).raw - eta * towards
