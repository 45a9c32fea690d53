"""Claims about training: killed anywhere it ends with the same bits, and NaN stops it at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.checkpoints import TrainingState
from unweave.diffusion_core.errors import ArtifactError, NonFiniteError, SelectionError
from unweave.diffusion_core.files import folder_lock, load_tensors
from unweave.diffusion_core.training import batch_indices, run_training

KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import rich.progress, safetensors.torch, torch
from unweave.diffusion_core import files
from unweave.diffusion_core.training import run_training

folder, num_steps, kills, report = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), []


def train(checkpoints, signals=None):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    parameters = dict(layers.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.05, weight_decay=0.1)
    tell = lambda letter: signals is None or os.write(signals, letter)
    sync = os.fsync

    def slow_sync(descriptor):
        tell(b"w")
        time.sleep(0.01)
        sync(descriptor)

    files.os.fsync = slow_sync if signals is not None else sync

    def loss(index, generator):
        return layers(torch.randn(16, 4, generator=generator)).sub(1).square().mean()

    def on_step(step, loss):
        tell(b"s")

    losses = run_training(loss, parameters, optimizer, num_steps=num_steps, seed=3, progress=False,
                          checkpoint_dir=checkpoints, checkpoint_every=5, on_step=on_step)
    state = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items()
             for k, v in s.items()}
    files.save_tensors(folder / f"{checkpoints.name}.safetensors",
                       {**parameters, **state, "losses": torch.tensor(losses)})


def forked(checkpoints, kill_at=None, delay=0.0):
    letter, count = kill_at or (b"", 0)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            train(checkpoints, writer if kill_at else None)
        finally:
            os._exit(0)
    os.close(writer)
    while kill_at and count and (seen := os.read(reader, 1)):
        count -= seen == letter
    if kill_at:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status := os.waitpid(pid, 0)[1]) else 0


warm = torch.zeros(1, requires_grad=True)
warm.grad = torch.zeros(1)
torch.optim.AdamW([warm]).step()
chance = random.Random(5)
forked(folder / "whole")
for number in range(kills):
    at = (b"ws"[number % 2 : number % 2 + 1], chance.randint(1, num_steps // (2 * kills) + 4))
    ended = forked(folder / "killed", at, chance.random() * 0.01)
    names = [path.name for path in (folder / "killed").iterdir()]
    report.append({"signal": ended, "names": names})
forked(folder / "killed")
print(json.dumps(report))
"""


def _parameter(value: float = 1.0, size: int = 3) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full((size,), value))


def _train(
    weight: torch.nn.Parameter,
    step_fn: Callable[[int, torch.Generator], Tensor] | None = None,
    **settings: Any,
) -> list[float]:
    def noisy_square(_: int, generator: torch.Generator) -> Tensor:
        return (weight - torch.randn(weight.shape, generator=generator)).square().sum()

    settings = {"num_steps": 6, "seed": 0, "progress": False, "lr": 0.1, **settings}
    kind = settings.pop("optimizer", torch.optim.Adam)
    optimizer = kind([weight], lr=settings.pop("lr"))
    return run_training(step_fn or noisy_square, {"weight": weight}, optimizer, **settings)


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="needs fork")
@pytest.mark.parametrize(
    ("num_steps", "kills"), [(80, 5), pytest.param(200, 50, marks=pytest.mark.stress)]
)
def test_a_run_killed_anywhere_ends_with_the_bits_of_an_uninterrupted_one(
    tmp_path: Path, num_steps: int, kills: int
) -> None:
    """Every other kill falls into the writing of a checkpoint."""
    command = [sys.executable, "-c", KILLS, str(tmp_path), str(num_steps), str(kills)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rounds = json.loads(output)
    assert [each["signal"] for each in rounds] == [9] * kills
    assert any(name.endswith(".tmp") for each in rounds for name in each["names"])
    whole, killed = (load_tensors(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and len(whole) == 4 + 4 * 3 + 1
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    for name in ("whole", "killed"):
        assert [path.name for path in (tmp_path / name).iterdir()] == [f"step-{num_steps:09}"]


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_resumed_in_any_epoch_the_samples_are_those_of_an_uninterrupted_run(
    tmp_path: Path, stop: int
) -> None:
    """Seven samples in batches of two make four steps an epoch."""

    def run(checkpoint_dir: Path, stop: int | None) -> list[list[int]]:
        weight, seen = _parameter(), []

        def step_fn(index: int, _: torch.Generator) -> Tensor:
            if index == stop:
                raise KeyboardInterrupt
            seen.append(batch_indices(7, 2, seed=4, step=index))
            return weight.square().sum()

        try:
            _train(weight, step_fn, num_steps=12, checkpoint_dir=checkpoint_dir, checkpoint_every=1)
        except KeyboardInterrupt:
            assert stop is not None
        return seen

    expected = run(tmp_path / "whole", None)
    assert run(tmp_path / "parts", stop) + run(tmp_path / "parts", None) == expected


def test_every_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    epochs = [
        [index for step in range(4) for index in batch_indices(7, 2, seed=0, step=4 * epoch + step)]
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_indices(7, 2, seed=1, step=0) != batch_indices(7, 2, seed=0, step=0)
    assert len(batch_indices(7, 2, seed=0, step=3)) == 1
    assert sorted(batch_indices(2, 5, seed=0, step=9)) == [0, 1]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 0), (1, 0, 0, 0), (1, 1, 0, -1)])
def test_an_impossible_batch_is_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(SelectionError):
        batch_indices(*arguments)


def test_randomness_is_a_function_of_seed_and_step_alone() -> None:
    draws: list[list[float]] = []
    for skipped, seed in ((0, 1), (3, 1), (0, 2)):
        torch.manual_seed(skipped)
        weight, seen = _parameter(), []

        def step_fn(
            _: int,
            generator: torch.Generator,
            seen: list[float] = seen,
            weight: torch.nn.Parameter = weight,
        ) -> Tensor:
            seen.extend([torch.rand(1, generator=generator).item(), torch.rand(1).item()])
            return weight.sum()

        _train(weight, step_fn, seed=seed)
        draws.append(seen)
    assert draws[0] == draws[1]
    assert len({*draws[0][::2], *draws[2][::2]}) == 12


def test_the_global_random_state_is_left_as_it_was() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _train(_parameter())
    assert torch.equal(torch.rand(3), expected)


def test_finished_training_is_loaded_and_not_repeated(tmp_path: Path) -> None:
    first, second = _parameter(), _parameter(5.0)
    losses = _train(first, checkpoint_dir=tmp_path)
    assert _train(second, lambda *_: pytest.fail("trained"), checkpoint_dir=tmp_path) == losses
    assert torch.equal(first, second)


def test_more_steps_continue_and_fewer_are_refused(tmp_path: Path) -> None:
    whole, parts = _parameter(), _parameter()
    expected = _train(whole, num_steps=9)
    _train(parts, num_steps=4, checkpoint_dir=tmp_path)
    assert _train(_parameter(), num_steps=9, checkpoint_dir=tmp_path) == expected
    with pytest.raises(ArtifactError, match="holds 9 steps"):
        _train(parts, num_steps=4, checkpoint_dir=tmp_path)


def test_a_checkpoint_can_be_read_by_itself(tmp_path: Path) -> None:
    weight = _parameter()
    losses = _train(weight, checkpoint_dir=tmp_path)
    state = TrainingState.load(tmp_path)
    assert (state.num_steps, list(state.losses)) == (6, losses)
    assert torch.equal(state.parameters["weight"], weight)
    assert state.run["seed"] == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"lr": 0.2}, "optimizer settings"),
        ({"optimizer": torch.optim.SGD}, "optimizer"),
        ({"gradient_accumulation": 2}, "gradient_accumulation"),
    ],
)
def test_another_run_does_not_continue_a_checkpoint(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    _train(_parameter(), checkpoint_dir=tmp_path)
    with pytest.raises(ArtifactError, match=named):
        _train(_parameter(), checkpoint_dir=tmp_path, **change)
    with pytest.raises(ArtifactError, match="parameters"):
        _train(_parameter(size=4), checkpoint_dir=tmp_path)


def test_a_damaged_checkpoint_is_named_and_parameters_stay(tmp_path: Path) -> None:
    _train(_parameter(), checkpoint_dir=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    weight = _parameter()
    with pytest.raises(ArtifactError, match=r"training\.safetensors"):
        _train(weight, checkpoint_dir=tmp_path)
    assert torch.equal(weight, _parameter())
    with pytest.raises(ArtifactError, match="no checkpoint"):
        TrainingState.load(tmp_path / "elsewhere")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "training"), pytest.raises(ArtifactError, match="in use"):
        _train(_parameter(), checkpoint_dir=tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_the_checkpoint_is_good(
    tmp_path: Path, value: float
) -> None:
    weight = _parameter()
    with pytest.raises(NonFiniteError, match=r"step 5: the loss.*step-000000004"):
        _train(
            weight,
            lambda index, _: weight.sum() * (value if index == 5 else 1.0),
            num_steps=9,
            checkpoint_dir=tmp_path,
            checkpoint_every=2,
        )
    assert weight.isfinite().all()
    state = TrainingState.load(tmp_path)
    assert state.num_steps == 4
    assert state.parameters["weight"].isfinite().all()


def test_a_gradient_that_is_not_finite_is_named_before_it_does_harm() -> None:
    weight = _parameter(0.0)
    with pytest.raises(NonFiniteError, match="step 0: the gradient of 'weight' has 3"):
        _train(weight, lambda *_: weight.square().sum().sqrt())
    assert torch.equal(weight, torch.zeros(3))


def test_a_parameter_that_is_not_finite_is_named_in_the_same_step(tmp_path: Path) -> None:
    weight = _parameter()
    with pytest.raises(NonFiniteError, match="step 2: 'weight' has 3 NaN or infinite"):
        _train(
            weight,
            lambda index, _: (weight - weight.detach()).sum() * (1e30 if index == 2 else 1.0),
            optimizer=torch.optim.SGD,
            lr=1e10,
            checkpoint_dir=tmp_path,
            checkpoint_every=1,
        )
    assert TrainingState.load(tmp_path).parameters["weight"].isfinite().all()


def test_large_finite_values_are_no_error() -> None:
    weight = _parameter(3e38)
    assert len(_train(weight, lambda *_: (weight * 0).sum(), optimizer=torch.optim.SGD)) == 6


def test_accumulated_steps_are_means_over_their_parts() -> None:
    single, parts = _parameter(), _parameter()
    targets = torch.randn(8, 3)
    expected = _train(
        single,
        lambda step, _: (single - targets[2 * step : 2 * step + 2]).square().mean(),
        num_steps=4,
    )
    calls: list[int] = []

    def part(index: int, _: torch.Generator) -> Tensor:
        calls.append(index)
        return (parts - targets[index]).square().mean()

    losses = _train(parts, part, num_steps=4, gradient_accumulation=2)
    assert calls == list(range(8))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    torch.testing.assert_close(parts, single)


def test_on_step_is_told_every_step_and_its_loss() -> None:
    told: list[tuple[int, float]] = []
    losses = _train(_parameter(), on_step=lambda step, loss: told.append((step, loss)))
    assert told == list(enumerate(losses))


def test_optimizers_with_other_kinds_of_state_resume_too(tmp_path: Path) -> None:
    for kind in (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.AdamW):
        whole, parts = _parameter(), _parameter()
        _train(whole, optimizer=kind)
        folder = tmp_path / kind.__name__
        _train(parts, optimizer=kind, num_steps=3, checkpoint_dir=folder)
        _train(resumed := _parameter(), optimizer=kind, checkpoint_dir=folder)
        assert torch.equal(whole, resumed)


def test_a_loss_without_gradient_and_foreign_parameters_are_refused() -> None:
    weight = _parameter()
    with pytest.raises(SelectionError, match="step_fn"):
        _train(weight, lambda *_: torch.tensor(1.0))
    with pytest.raises(SelectionError, match="step_fn"):
        _train(weight, lambda *_: weight * 2)
    with pytest.raises(SelectionError, match="same tensors"):
        run_training(
            lambda *_: weight.sum(),
            {"weight": _parameter()},
            torch.optim.SGD([weight]),
            num_steps=1,
            seed=0,
        )


@pytest.mark.parametrize("name", ["num_steps", "checkpoint_every", "gradient_accumulation"])
def test_counts_below_one_are_named(name: str) -> None:
    with pytest.raises(SelectionError, match=name):
        _train(_parameter(), **{name: 0})


LAUNCHED = """
import sys, torch
from accelerate import Accelerator
from unweave.diffusion_core.training import run_training

weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.Adam([weight], lr=0.1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
for num_steps in (3, 6):
    losses = run_training(
        lambda index, generator: (weight - torch.randn(3, generator=generator)).square().sum(),
        {"weight": weight}, optimizer, num_steps=num_steps, seed=0, progress=False,
        checkpoint_dir=sys.argv[1], checkpoint_every=2, accelerator=accelerator)
accelerator.end_training()
"""


def test_two_launched_processes_do_what_two_accumulated_parts_do(tmp_path: Path) -> None:
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(script), str(tmp_path / "run")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    weight = _parameter()
    losses = _train(weight, gradient_accumulation=2)
    state = TrainingState.load(tmp_path / "run")
    assert list(state.losses) == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(state.parameters["weight"], weight.detach())
    assert state.run["processes"] == 2
