"""A LoRA on a language model while it is trained, and the changes of weights it stands for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unweave.diffusion_core.changes import Change, LowRank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from unweave.erasure.class_unlearning.language import TopicUnlearningConfig


@contextmanager
def with_lora(
    model: PreTrainedModel, config: TopicUnlearningConfig, seed: int
) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """Yield the model wrapped by a new adapter, and the settings under which it is saved."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    required = {name: p.requires_grad for name, p in model.named_parameters()}
    settings = {
        "r": config.rank,
        "target_modules": config.target_modules
        if isinstance(config.target_modules, str)
        else list(config.target_modules),
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in model.modules()),
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**settings, lora_alpha=config.alpha))
    try:
        # The scale alpha / r goes into the saved factors.
        yield wrapped, {**settings, "lora_alpha": config.rank}
    finally:
        wrapped.unload()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def lora_changes(wrapped: nn.Module, transposed: bool) -> dict[str, Change]:
    """Return what the adapter adds to each weight, with its scale in the factors.

    `transposed` is for weights that are (in, out), as in GPT-2.
    """
    changes: dict[str, Change] = {}
    for name, module in wrapped.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        scale = module.scaling["default"]
        down = module.lora_A["default"].weight.detach().float().cpu()
        up = scale * module.lora_B["default"].weight.detach().float().cpu()
        if transposed:
            down, up = up.T.contiguous(), down.T.contiguous()
        changes[f"{name.removeprefix('base_model.model.')}.weight"] = LowRank(down, up)
    return changes
