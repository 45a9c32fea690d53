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
    """How long and how fast to train; `ema` is the decay of the averaged weights.

    The learning rate warms up over the first twentieth of the steps, stays, and falls over the
    last `cool_down` of them.
    """

    steps: int
    batch_size: int
    learning_rate: float
    ema: float = 0.995
    cool_down: float = 0.95
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
        losses: list[float] = []
        for step in range(first, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(
                    step / recipe.steps, recipe.cool_down
                )
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
            losses.append(loss.item())
            bar.update(task, completed=step + 1, loss=f"{losses[-1]:.4f}")
            if (step + 1) % recipe.checkpoint_every == 0 or step + 1 == recipe.steps:
                mean = sum(losses) / len(losses)
                bar.console.print(f"{folder.name}: step {step + 1}, mean loss {mean:.5f}")
                _checkpoint(folder, step + 1, mean, recipe, model, average, optimizer)
                losses.clear()
    model.load_state_dict(average)
    model.cpu().eval()


def learning_rate_factor(progress: float, cool_down: float, warm_up: float = 0.05) -> float:
    """Linear warm-up, a plateau of 1, then half a cosine down to a hundredth.

    >>> [round(learning_rate_factor(p, 0.5), 3) for p in (0.025, 0.3, 0.75, 1.0)]
    [0.52, 1.0, 0.505, 0.01]
    """
    if progress < warm_up:
        return (progress + 1e-3) / warm_up
    falling = max(0.0, progress - (1 - cool_down)) / cool_down
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * falling))


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
