"""The loop that trains every embedded model: seeded, averaged, resumable."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unweave.emoji_world.train.batches import DEVICE

StepFunction = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How long and how fast to train; `ema` is the decay of the averaged weights."""

    steps: int
    batch_size: int
    learning_rate: float
    ema: float = 0.995
    seed: int = 0
    checkpoint_every: int = 200


def train(model: nn.Module, loss_at: StepFunction, recipe: Recipe, folder: Path) -> None:
    """Trains `model` in place under a one-cycle schedule and leaves the averaged weights in it.

    Batches are a function of the step and its generator, so a run killed anywhere continues from
    `folder` as if it had never stopped.

    Raises:
        ValueError: when `folder` holds a run of another recipe.
        FloatingPointError: when a loss is not finite; the last checkpoint stays.
    """
    from rich.progress import Progress, TextColumn

    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=0.01)
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    first = _resume(folder, recipe, model, average, optimizer)
    model.train()
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task(folder.name, total=recipe.steps, completed=first, loss="")
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * one_cycle(step / recipe.steps)
            generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
            torch.manual_seed(recipe.seed * 1_000_003 + step)
            loss = loss_at(step, generator)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss is {loss.item()} at step {step} of {folder.name}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            _update_average(average, model, min(recipe.ema, (step + 1) / (step + 10)))
            bar.update(task, completed=step + 1, loss=f"{loss.item():.4f}")
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                _checkpoint(folder, step + 1, loss.item(), recipe, model, average, optimizer)
    model.load_state_dict(average)
    model.cpu().eval()


def one_cycle(progress: float, warm_up: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to a hundredth."""
    if progress < warm_up:
        return (progress + 1e-3) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


@torch.no_grad()
def _update_average(average: dict[str, Tensor], model: nn.Module, decay: float) -> None:
    for name, value in model.state_dict().items():
        if value.dtype.is_floating_point:
            average[name].lerp_(value, 1 - decay)
        else:
            average[name].copy_(value)


def _checkpoint(
    folder: Path,
    step: int,
    loss: float,
    recipe: Recipe,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    header = {"step": str(step), "loss": str(loss), "recipe": json.dumps(asdict(recipe))}
    save_file(tensors, folder / "state.tmp", metadata=header)
    with (folder / "state.tmp").open("rb") as file:
        os.fsync(file.fileno())
    (folder / "state.tmp").replace(folder / "state.safetensors")


def _resume(
    folder: Path,
    recipe: Recipe,
    model: nn.Module,
    average: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> int:
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    if json.loads(header["recipe"]) != asdict(recipe):
        raise ValueError(f"{path} belongs to another recipe: choose another folder or delete it")
    tensors = load_file(path, device=str(DEVICE))
    model.load_state_dict(_part(tensors, "model."))
    average.update(_part(tensors, "average."))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in _part(tensors, "optimizer.").items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return int(header["step"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
