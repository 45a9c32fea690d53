"""Checkpoints of training: saved whole or not at all, and continued by the same run only."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.diffusion_core.errors import ArtifactError, SelectionError
from unweave.diffusion_core.files import (
    atomic_folder,
    folder_lock,
    load_tensors,
    read_manifest,
    save_tensors,
    write_manifest,
)

_TENSORS = "training.safetensors"
_PREFIX = "step-"


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


@dataclass(frozen=True)
class CheckpointStore:
    """The newest checkpoint of one run, in a folder `step-<n>` under `folder`.

    Of several processes that train together, the one that `leads` locks the folder and writes.
    """

    folder: Path
    run: Mapping[str, Any]
    leads: bool

    @classmethod
    @contextlib.contextmanager
    def opened(cls, folder: Path, run: Mapping[str, Any], leads: bool) -> Iterator[CheckpointStore]:
        """Lock the folder against other processes and clear away what a killed one left.

        Only the leading process does both: the others have to wait for it before they `restore`.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"cannot write `checkpoint_dir` {str(folder)!r}: {error}"
            ) from error
        store = cls(folder, run, leads)
        with contextlib.ExitStack() as stack:
            if leads:
                stack.enter_context(folder_lock(folder / "training"))
                store._clean()
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
        if not self.leads:
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


def describe_run(
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    seed: int,
    gradient_accumulation: int,
    processes: int,
) -> dict[str, Any]:
    """Return what must be equal for one run to continue another."""
    shapes = {name: f"{tensor.dtype} {tuple(tensor.shape)}" for name, tensor in parameters.items()}
    groups = _encode(optimizer.state_dict()["param_groups"], "group", {})
    return {
        "seed": seed,
        "gradient_accumulation": gradient_accumulation,
        "processes": processes,
        "parameters": shapes,
        "optimizer": type(optimizer).__name__,
        "optimizer settings": groups,
    }


def _newest(checkpoint_dir: Path) -> Path | None:
    found = sorted(path for path in checkpoint_dir.glob(f"{_PREFIX}*") if path.is_dir())
    return found[-1] if found else None


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
