"""Training that can be killed anywhere and ends with the same bits when it is started again."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from unweave.diffusion_core.checkpoints import CheckpointStore, describe_run
from unweave.diffusion_core.errors import ArtifactError, NonFiniteError, SelectionError

if TYPE_CHECKING:
    from accelerate import Accelerator

StepFn = Callable[[int, torch.Generator], Tensor]

_GRADIENT_ADVICE = "the parameters are still those of the step before: lower the learning rate"


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
            run = describe_run(parameters, optimizer, seed, gradient_accumulation, team.size)
            store = stack.enter_context(
                CheckpointStore.opened(Path(checkpoint_dir), run, team.leads)
            )
            team.wait()
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
