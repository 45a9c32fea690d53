"""Changes of parameters, dense or low-rank: copied, added, turned into a LoRA and into tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unweave.diffusion_core.errors import ArtifactError, NonFiniteError, SelectionError
from unweave.diffusion_core.keys import canonical_key

_SEPARATOR, _DOWN, _UP = "/", "//down", "//up"


@dataclass(frozen=True)
class LowRank:
    """A change of an `nn.Linear` weight as `up @ down`: down (r, in), up (out, r)."""

    down: Tensor
    up: Tensor

    def __post_init__(self) -> None:
        """Check that the factors fit each other."""
        if self.down.ndim != 2 or self.up.ndim != 2 or self.down.shape[0] != self.up.shape[1]:
            raise SelectionError(
                "`down` must be (r, in) and `up` (out, r), got "
                f"{tuple(self.down.shape)} and {tuple(self.up.shape)}"
            )

    @property
    def rank(self) -> int:
        """The number r of rows of `down`."""
        return self.down.shape[0]

    @property
    def shape(self) -> torch.Size:
        """The shape (out, in) of the weight that is changed."""
        return torch.Size((self.up.shape[0], self.down.shape[1]))

    def dense(self) -> Tensor:
        """Return the change as one (out, in) tensor."""
        return self.up @ self.down


Change = Tensor | LowRank
"""A change of one parameter."""

Changes = Mapping[str, Mapping[str, Change]]
"""Changes of the models of a pipeline, {component: {parameter name: change}}."""

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""LoRA factors, {component: {module path: (down, up)}}."""


def as_dense(change: Change) -> Tensor:
    """Return a change as one tensor of the shape of the parameter."""
    return change.dense() if isinstance(change, LowRank) else change


def flat(changes: Changes) -> Iterator[tuple[str, str, Change]]:
    """Go through changes as (component, parameter name, change)."""
    for component, named in changes.items():
        for name, change in named.items():
            yield component, name, change


def own_copies(changes: Changes) -> dict[str, dict[str, Change]]:
    """Return copies on the CPU under canonical names, of the components that are changed at all.

    Raises `NonFiniteError` for NaN or infinite changes.
    """
    return {
        component: {
            canonical_key(component, name): _own_copy(component, name, change)
            for name, change in named.items()
        }
        for component, named in changes.items()
        if named
    }


def misfit(changes: Mapping[str, Change], parameters: Mapping[str, Tensor]) -> str | None:
    """Say which change does not fit the `parameters` of its model, or return None."""
    for name, change in changes.items():
        if name not in parameters:
            return f"{name}, which the pipeline lacks"
        found = parameters[name].shape
        if found != change.shape:
            return f"{name} of shape {tuple(change.shape)}, and the pipeline has {tuple(found)}"
    return None


def merged(first: Changes, second: Changes) -> dict[str, dict[str, Change]]:
    """Return the changes of both, added up where they meet; low-rank factors stay low-rank.

    Raises `ArtifactError` for two changes of one parameter that differ in shape.
    """
    result = {component: dict(named) for component, named in first.items()}
    for component, name, change in flat(second):
        mine = result.setdefault(component, {})
        mine[name] = _sum(mine[name], change) if name in mine else change
    return result


def lora_factors(changes: Changes, rank: int | None) -> tuple[Factors, float]:
    """Return LoRA factors and their relative Frobenius error; see `WeightDelta.to_lora`."""
    if rank is not None and rank < 1:
        raise SelectionError(f"`rank` must be at least 1, got {rank}")
    factors: Factors = {}
    squared_error = squared_norm = 0.0
    for component, name, change in flat(changes):
        path = _linear_path(component, name, change)
        close = _low_rank(change, rank)
        exact = close is change
        dense = as_dense(change).double()
        squared_norm += dense.square().sum().item()
        if not exact:
            squared_error += (dense - close.dense().double()).square().sum().item()
        factors.setdefault(component, {})[path] = (close.down, close.up)
    return factors, math.sqrt(squared_error / squared_norm) if squared_norm else 0.0


def to_tensors(changes: Changes) -> dict[str, Tensor]:
    """Return changes as tensors by the names under which a file holds them."""
    tensors = {}
    for component, name, change in flat(changes):
        key = component + _SEPARATOR + name
        if isinstance(change, LowRank):
            tensors[key + _DOWN], tensors[key + _UP] = change.down, change.up
        else:
            tensors[key] = change
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Change]]:
    """Return the changes of which `to_tensors` made `tensors`.

    Raises `KeyError` when one of two factors is missing.
    """
    changes: dict[str, dict[str, Change]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(_SEPARATOR)
        if name.endswith(_UP):
            continue
        change: Change = tensor
        if name.endswith(_DOWN):
            name = name.removesuffix(_DOWN)
            change = LowRank(tensor, tensors[component + _SEPARATOR + name + _UP])
        changes.setdefault(component, {})[name] = change
    return changes


def _own_copy(component: str, name: str, change: Change) -> Change:
    tensors = (change.down, change.up) if isinstance(change, LowRank) else (change,)
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise NonFiniteError(f"the change of {component}.{name} has NaN or infinite values")
    copies = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors]
    return LowRank(copies[0], copies[1]) if isinstance(change, LowRank) else copies[0]


def _sum(first: Change, second: Change) -> Change:
    if first.shape != second.shape:
        raise ArtifactError(
            f"cannot merge changes of shapes {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return LowRank(torch.cat([first.down, second.down]), torch.cat([first.up, second.up], 1))
    return as_dense(first) + as_dense(second)


def _linear_path(component: str, name: str, change: Change) -> str:
    path, _, kind = name.rpartition(".")
    if len(change.shape) != 2 or kind != "weight" or path.endswith("_embedding"):
        raise SelectionError(
            f"{component}.{name} of shape {tuple(change.shape)} is no weight of an nn.Linear, so "
            "the delta cannot be a LoRA: keep it as a delta, or edit linear weights only"
        )
    return path


def _low_rank(change: Change, rank: int | None) -> LowRank:
    if isinstance(change, LowRank) and (rank is None or change.rank <= rank):
        return change
    dense = as_dense(change)
    left, values, right = torch.linalg.svd(dense.double(), full_matrices=False)
    if rank is None:
        tolerance = values[0] * max(dense.shape) * torch.finfo(dense.dtype).eps
        rank = max(1, int((values > tolerance).sum()))
    root = values[:rank].sqrt()
    down = root[:, None] * right[:rank]
    return LowRank(down.to(dense.dtype), (left[:, :rank] * root).to(dense.dtype))
