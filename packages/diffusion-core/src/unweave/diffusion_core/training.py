"""Training that can be killed anywhere and ends with the same bits when it is started again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.diffusion_core.errors import ArtifactError, NonFiniteError, SelectionError
from unweave.diffusion_core.files import (
    atomic_folder,
    folder_lock,
    load_tensors,
    read_manifest,
    save_tensors,
    write_manifest,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

StepFn = Callable[[int, torch.Generator], Tensor]

_TENSORS = "training.safetensors"
_PREFIX = "step-"
_GRADIENT_ADVICE = "the parameters are still those of the step before: lower the learning rate"


@dataclass(frozen=True)
class TrainingState:
    """A checkpoint: the loss of every step so far, parameters by name and the optimizer's state.

    `run` holds what must be equal for a run to continue from it.
    """

    losses: tuple[float, ...]
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    run: Mapping[str, Any]

    @property
    def num_steps(self) -> int:
        """The number of optimizer steps that were done."""
        return len(self.losses)

    @classmethod
    def load(cls, checkpoint_dir: str | Path) -> TrainingState:
        """Read the newest checkpoint in `checkpoint_dir`, on the CPU.

        Raises `ArtifactError` when there is none or it is damaged.
        """
        newest = _newest(Path(checkpoint_dir))
        if newest is None:
            raise ArtifactError(f"{str(checkpoint_dir)!r} holds no checkpoint of a training run")
        manifest = read_manifest(newest)
        tensors = load_tensors(newest / _TENSORS)
        try:
            return cls(
                tuple(float(loss) for loss in manifest["losses"]),
                {name: tensors[f"parameter.{name}"] for name in manifest["run"]["parameters"]},
                _decode(manifest["optimizer"], tensors),
                manifest["run"],
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{str(newest)!r} is no checkpoint of a training run: {error!r} is missing or wrong"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the checkpoint to `folder`, whole or not at all."""
        tensors = {f"parameter.{name}": tensor for name, tensor in self.parameters.items()}
        encoded = _encode(dict(self.optimizer), "optimizer", tensors)
        with atomic_folder(folder) as new:
            save_tensors(new / _TENSORS, tensors)
            content = {"run": self.run, "optimizer": encoded, "losses": self.losses}
            write_manifest(new, content)


def run_training(
    step_fn: StepFn,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    num_steps: int,
    seed: int,
    checkpoint_dir: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
    gradient_accumulation: int = 1,
    accelerator: Accelerator | None = None,
) -> list[float]:
    """Minimise `step_fn(index, generator)`, a scalar loss, and return the loss of each step.

    `index` counts the calls from 0, `gradient_accumulation` of them to an optimizer step, whose
    loss is their mean. `on_step(step, loss)` is called after each of these, counted from 0, and
    again for those that a resumed run repeats. Randomness must come from the CPU `generator` or
    torch's global one: both are functions of (seed, index) alone, so a step depends on those
    before it only through the parameters. The global random state is put back at the end.

    With the `accelerator` of a script under `accelerate launch` or `torchrun`, each of its n
    processes makes a part of every step: `index` counts the parts of all, their gradients are
    averaged, and the first process alone writes checkpoints. So n processes do what
    `gradient_accumulation=n` does in one.

    With `checkpoint_dir`, parameters and optimizer are saved there every `checkpoint_every` steps
    and at the end, each time whole or not at all. The same call made again continues from there and
    ends, on the same machine and number of threads, with the same bits as if never interrupted.

    Raises `NonFiniteError`, naming step and tensor, as soon as a loss, a gradient or a parameter is
    NaN or infinite; `SelectionError` for settings that cannot work; `ArtifactError` when the
    folder holds the checkpoint of another run or another process is writing there.

    >>> weight = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.5)
    >>> run_training(
    ...     lambda index, generator: weight.square().sum(),
    ...     {"weight": weight},
    ...     optimizer,
    ...     num_steps=2,
    ...     seed=0,
    ... )
    [2.0, 0.0]
    """
    _check(parameters, optimizer, num_steps, checkpoint_every, gradient_accumulation)
    team = _Team(accelerator)
    with contextlib.ExitStack() as stack:
        store = None
        if checkpoint_dir is not None:
            run = _describe(parameters, optimizer, seed, gradient_accumulation, team)
            store = stack.enter_context(_Store.opened(Path(checkpoint_dir), run, team))
        losses = store.restore(parameters, optimizer) if store else []
        if len(losses) > num_steps:
            raise ArtifactError(
                f"{str(checkpoint_dir)!r} holds {len(losses)} steps of training, more than "
                f"`num_steps` {num_steps}: give at least {len(losses)} or another folder"
            )
        stack.enter_context(_fork_rng(parameters))
        shown = progress and team.leads
        advance = stack.enter_context(_progress_bar(num_steps, len(losses), shown))
        for step in range(len(losses), num_steps):
            try:
                loss = _optimizer_step(
                    step_fn, parameters, optimizer, step, seed, gradient_accumulation, team
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{error}{store.advice() if store else ''}") from None
            losses.append(loss)
            advance(loss)
            if on_step is not None:
                on_step(step, loss)
            if store and (len(losses) % checkpoint_every == 0 or len(losses) == num_steps):
                store.save(parameters, optimizer, losses)
    return losses


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> list[int]:
    """Return which of `n` samples make up the batch of `step`, counted from 0.

    Every epoch is a new shuffle of all samples in ceil(n / batch_size) batches, the last of which
    may be smaller. The result depends on the arguments alone, so a resumed run goes on where it
    stopped.

    >>> first, second = batch_indices(5, 3, seed=0, step=0), batch_indices(5, 3, seed=0, step=1)
    >>> sorted(first + second)
    [0, 1, 2, 3, 4]
    """
    if n < 1 or batch_size < 1 or step < 0:
        raise SelectionError(
            "`n` and `batch_size` must be at least 1 and `step` at least 0, got "
            f"{n}, {batch_size} and {step}"
        )
    epoch, batch = divmod(step, math.ceil(n / batch_size))
    generator = torch.Generator().manual_seed(_derived_seed("epoch", seed, epoch))
    order = torch.randperm(n, generator=generator)
    chosen: list[int] = order[batch * batch_size : (batch + 1) * batch_size].tolist()
    return chosen


def _optimizer_step(
    step_fn: StepFn,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seed: int,
    gradient_accumulation: int,
    team: _Team,
) -> float:
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for part in range(gradient_accumulation):
        index = (step * gradient_accumulation + part) * team.size + team.rank
        step_seed = _derived_seed("step", seed, index)
        torch.manual_seed(step_seed)
        loss = step_fn(index, torch.Generator().manual_seed(step_seed))
        value = _checked_loss(loss, step, team)
        torch.autograd.backward(loss / gradient_accumulation)
        total += value / gradient_accumulation
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    team.average(gradients.values())
    _check_finite(gradients, step, "the gradient of ", _GRADIENT_ADVICE)
    optimizer.step()
    _check_finite(parameters, step, "", "lower the learning rate or use float32")
    return total


def _checked_loss(loss: Tensor, step: int, team: _Team) -> float:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise SelectionError(
            f"step {step}: `step_fn` must return a scalar tensor that depends on the parameters; "
            "check that they require gradients and that nothing runs under torch.no_grad()"
        )
    value = team.mean(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteError(
            f"step {step}: the loss is {value}; check the inputs, lower the learning rate or use "
            "float32"
        )
    return value


def _check_finite(tensors: Mapping[str, Tensor], step: int, prefix: str, advice: str) -> None:
    """Name the first tensor with NaN or infinity, looking closely only if a sum is suspicious."""
    if not tensors:
        return
    sums = [tensor.detach().sum(dtype=torch.float32) for tensor in tensors.values()]
    if math.isfinite(torch.stack([total.to(sums[0].device) for total in sums]).sum().item()):
        return
    for name, tensor in tensors.items():
        count = int((~tensor.detach().isfinite()).sum())
        if count:
            raise NonFiniteError(
                f"step {step}: {prefix}{name!r} has {count} NaN or infinite values of "
                f"{tensor.numel()}; {advice}"
            )


def _derived_seed(purpose: str, seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{purpose} {seed} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class _Team:
    """The processes that train together: one, unless an accelerator says otherwise."""

    accelerator: Accelerator | None

    @property
    def size(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def rank(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def mean(self, loss: Tensor) -> float:
        if self.accelerator and self.size > 1:
            loss = self.accelerator.reduce(loss.reshape(1), "mean")
        return float(loss)

    def average(self, gradients: Iterable[Tensor]) -> None:
        """Put the mean over all processes into each gradient."""
        if self.accelerator and self.size > 1:
            for gradient in gradients:
                gradient.copy_(self.accelerator.reduce(gradient, "mean"))

    def wait(self) -> None:
        if self.accelerator:
            self.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class _Store:
    """The newest checkpoint of one run, in a folder `step-<n>` under `folder`."""

    folder: Path
    run: Mapping[str, Any]
    team: _Team

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, run: Mapping[str, Any], team: _Team) -> Iterator[_Store]:
        """Lock the folder against other processes and clear away what a killed one left."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot write `checkpoint_dir` {str(folder)!r}: {error}"
            ) from error
        store = cls(folder, run, team)
        with contextlib.ExitStack() as stack:
            if team.leads:
                stack.enter_context(folder_lock(folder / "training"))
                store._clean()
            team.wait()
            yield store

    def restore(
        self, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
    ) -> list[float]:
        """Load the newest checkpoint, if any, and return the losses of the steps it has."""
        newest = _newest(self.folder)
        if newest is None:
            return []
        state = TrainingState.load(self.folder)
        self._check_same_run(state.run, newest)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.parameters[name])
        optimizer.load_state_dict(dict(state.optimizer))
        return list(state.losses)

    def save(
        self,
        parameters: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        losses: list[float],
    ) -> None:
        """Write a checkpoint whole, then remove the one before."""
        if not self.team.leads:
            return
        state = TrainingState(tuple(losses), parameters, optimizer.state_dict(), self.run)
        state.save(self.folder / f"{_PREFIX}{len(losses):09d}")
        self._clean()

    def advice(self) -> str:
        """Say which checkpoint is the last good one."""
        newest = _newest(self.folder)
        return f"; the last good checkpoint is {str(newest)!r}" if newest else ""

    def _clean(self) -> None:
        newest = _newest(self.folder)
        for path in (*self.folder.glob(f"{_PREFIX}*"), *self.folder.glob(f".{_PREFIX}*.tmp")):
            if path != newest:
                shutil.rmtree(path, ignore_errors=True)

    def _check_same_run(self, recorded: Mapping[str, Any], path: Path) -> None:
        for key, expected in json.loads(json.dumps(self.run)).items():
            if recorded.get(key) != expected:
                raise ArtifactError(
                    f"{str(path)!r} is the checkpoint of another run: its {key} is "
                    f"{_shown(recorded.get(key))}, and that of this run {_shown(expected)}; choose "
                    "another `checkpoint_dir` or the old settings"
                )


def _newest(checkpoint_dir: Path) -> Path | None:
    found = sorted(path for path in checkpoint_dir.glob(f"{_PREFIX}*") if path.is_dir())
    return found[-1] if found else None


def _describe(
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    seed: int,
    gradient_accumulation: int,
    team: _Team,
) -> dict[str, Any]:
    """Return what must be equal for one run to continue another."""
    shapes = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in parameters.items()}
    groups = _encode(optimizer.state_dict()["param_groups"], "group", {})
    return {
        "seed": seed,
        "gradient_accumulation": gradient_accumulation,
        "processes": team.size,
        "parameters": shapes,
        "optimizer": type(optimizer).__name__,
        "optimizer settings": groups,
    }


def _encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON with its tensors moved to `tensors`; dicts become lists of pairs."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, dict):
        pairs = [[key, _encode(item, f"{path}.{key}", tensors)] for key, item in value.items()]
        return {"dict": pairs}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise SelectionError(
        f"the optimizer's state {path!r} is a {type(value).__name__}, which cannot be saved "
        "without pickle: use an optimizer of torch.optim or no `checkpoint_dir`"
    )


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _check(
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    checkpoint_every: int,
    gradient_accumulation: int,
) -> None:
    counts = {
        "num_steps": num_steps,
        "checkpoint_every": checkpoint_every,
        "gradient_accumulation": gradient_accumulation,
    }
    for name, value in counts.items():
        if value < 1:
            raise SelectionError(f"`{name}` must be at least 1, got {value}")
    named = {id(tensor) for tensor in parameters.values()}
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not named or named != optimized:
        raise SelectionError(
            f"`parameters` and `optimizer` must hold the same tensors: {len(named - optimized)} "
            f"are only in `parameters`, {len(optimized - named)} only in `optimizer`"
        )


def _fork_rng(parameters: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    devices = {tensor.device for tensor in parameters.values() if tensor.device.type == "cuda"}
    return torch.random.fork_rng(devices=list(devices))


@contextlib.contextmanager
def _progress_bar(num_steps: int, done: int, wanted: bool) -> Iterator[Callable[[float], None]]:
    """Yield a function to call after each step; it shows something only in a terminal."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.4g}"),
    )
    bar = Progress(*columns, transient=True)
    bar.disable = not (wanted and bar.console.is_terminal)
    with bar:
        task = bar.add_task("training", total=num_steps, completed=done, loss=math.nan)
        yield lambda loss: bar.update(task, advance=1, loss=loss)
