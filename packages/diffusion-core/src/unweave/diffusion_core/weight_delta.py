"""Edits of a model's weights as small, verified artifacts that are applied and undone exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import (
    ArtifactError,
    NonFiniteError,
    SelectionError,
    UnweaveError,
)
from unweave.diffusion_core.files import (
    atomic_folder,
    load_tensors,
    read_manifest,
    save_tensors,
    write_manifest,
)
from unweave.diffusion_core.keys import base_parameters, canonical_key
from unweave.diffusion_core.originals import edits_of
from unweave.diffusion_core.pipelines import (
    Pipeline,
    base_model_hash,
    base_weights,
    hash_weights,
    hashed_components,
)

DELTA_FILE = "delta.safetensors"
_PACKAGES = ("unweave-diffusion-core", "torch", "diffusers", "transformers")
_SEPARATOR, _DOWN, _UP = "/", "//down", "//up"
_READ_ATTEMPTS = 20


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

Factors = dict[str, dict[str, tuple[Tensor, Tensor]]]
"""LoRA factors, {component: {module path: (down, up)}}."""


def current_versions() -> dict[str, str]:
    """Return the installed versions of the packages on which an artifact depends."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True)
class DeltaMeta:
    """Where a delta comes from: base model, method, its settings (JSON values) and versions."""

    base_hash: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=current_versions)

    def __post_init__(self) -> None:
        """Check every field."""
        if len(self.base_hash) != 64 or set(self.base_hash) - set("0123456789abcdef"):
            raise ArtifactError(
                f"`base_hash` must be 64 hexadecimal digits, got {self.base_hash!r}"
            )
        if not self.method.strip():
            raise ArtifactError(f"`method` must name the method, got {self.method!r}")
        try:
            json.dumps(dict(self.settings), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"`settings` must hold JSON values only: {error}") from error


class AppliedDelta:
    """A delta that is applied to a pipeline until `revert` or the end of a `with` block."""

    def __init__(self, delta: WeightDelta, pipe: Pipeline) -> None:
        """Remember what was applied to which pipeline."""
        self.delta = delta
        self._pipe = pipe

    def revert(self) -> None:
        """Undo the delta; see `WeightDelta.revert`."""
        self.delta.revert(self._pipe)

    def __enter__(self) -> AppliedDelta:
        """Return self: the delta is already applied."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo the delta unless that was done inside the block."""
        if self.delta.is_applied(self._pipe):
            self.revert()


class WeightDelta:
    """Changes of parameters, {component: {parameter name: tensor or `LowRank`}}, with their origin.

    Names in text encoders are kept in the canonical `text_model.` form and found in whatever form
    the installed transformers version uses. Tensors are kept on the CPU.
    """

    def __init__(
        self, deltas: Mapping[str, Mapping[str, Change]], meta: DeltaMeta, *, strict: bool = True
    ) -> None:
        """Check and copy the changes; `strict=False` lets the delta be applied to any base model.

        Raises `NonFiniteError` for NaN or infinite changes, `SelectionError` for none at all.
        """
        self._deltas = {
            component: {
                canonical_key(component, name): _own_copy(component, name, change)
                for name, change in changes.items()
            }
            for component, changes in deltas.items()
            if changes
        }
        if not self._deltas:
            raise SelectionError("a weight delta must change at least one parameter, got none")
        self.meta = meta
        self.strict = strict

    @classmethod
    def from_weights(
        cls,
        before: Mapping[str, Mapping[str, Tensor]],
        pipe: Pipeline,
        *,
        method: str,
        settings: Mapping[str, Any] | None = None,
    ) -> WeightDelta:
        """Return what training changed: the weights of `pipe` minus those `before` it.

        `before` is {component: state dict}, whole or of the trained parameters only; parameters
        that are bit-identical are left out. The base model is the pipeline with `before` in it.
        """
        deltas: dict[str, dict[str, Change]] = {}
        base = {name: base_weights(pipe, name) for name in hashed_components(pipe)}
        for component, state in before.items():
            current = base_parameters(component, _component(pipe, component))
            for given, old in state.items():
                name = canonical_key(component, given)
                if name not in current:
                    continue
                new = current[name].detach()
                if new.shape != old.shape:
                    raise SelectionError(
                        f"{component}.{given} had the shape {tuple(old.shape)} before and has "
                        f"{tuple(new.shape)} now; a weight delta cannot change shapes"
                    )
                old = old.detach().to(new)
                if component in base:
                    base[component][name] = old
                if not torch.equal(old, new):
                    deltas.setdefault(component, {})[name] = new.float() - old.float()
        meta = DeltaMeta(hash_weights(base), method, dict(settings or {}))
        return cls(deltas, meta)

    @property
    def deltas(self) -> Mapping[str, Mapping[str, Change]]:
        """The changes, {component: {canonical parameter name: change}}, read-only."""
        return MappingProxyType({key: MappingProxyType(val) for key, val in self._deltas.items()})

    @property
    def low_rank(self) -> bool:
        """Whether every change is stored as low-rank factors, hence exactly a LoRA."""
        return all(isinstance(change, LowRank) for _, _, change in self._items())

    def apply(self, pipe: Pipeline, strength: float = 1.0, *, strict: bool = True) -> AppliedDelta:
        """Add `strength` times the changes to the weights of `pipe`, keeping the originals.

        Deltas add up: with several applied, weights are the originals plus every delta in the
        order of application. Raises `ArtifactError` on another base model, unless `strict` here
        or in the delta is False, and `UnweaveError` when this delta is already applied.
        """
        if not math.isfinite(strength):
            raise UnweaveError(f"`strength` must be a finite number, got {strength!r}")
        if self.is_applied(pipe):
            raise UnweaveError("this delta is already applied to this pipeline: revert it first")
        self._check_parameters(pipe)
        if strict and self.strict:
            self._check_base(pipe)
        for component, changes in self._deltas.items():
            module = _component(pipe, component)
            edits, parameters = edits_of(module), base_parameters(component, module)
            for name in changes.keys() - edits.originals.keys():
                edits.originals[name] = parameters[name].detach().clone()
            edits.active.append((self, float(strength)))
            _recompute(component, module, changes)
        return AppliedDelta(self, pipe)

    def revert(self, pipe: Pipeline) -> None:
        """Take this delta out of `pipe`; without any delta left, weights are the stored originals.

        Raises `UnweaveError` when the delta is not applied to `pipe`.
        """
        if not self.is_applied(pipe):
            raise UnweaveError("this delta is not applied to this pipeline, so cannot be reverted")
        for component, changes in self._deltas.items():
            module = _component(pipe, component)
            edits = edits_of(module)
            edits.active = [pair for pair in edits.active if pair[0] is not self]
            _recompute(component, module, changes)

    def is_applied(self, pipe: Pipeline) -> bool:
        """Return whether this very object is applied to `pipe` now."""
        return any(
            delta is self
            for component in self._deltas
            for delta, _ in edits_of(_component(pipe, component)).active
        )

    def merge(self, other: WeightDelta) -> WeightDelta:
        """Return one delta with the changes of both; low-rank factors stay low-rank.

        Raises `ArtifactError` when the two belong to different base models.
        """
        if self.meta.base_hash != other.meta.base_hash:
            raise ArtifactError(
                f"cannot merge deltas of two base models, {self.meta.base_hash} and "
                f"{other.meta.base_hash}"
            )
        merged: dict[str, dict[str, Change]] = {c: dict(v) for c, v in self._deltas.items()}
        for component, name, change in other._items():
            mine = merged.setdefault(component, {})
            mine[name] = _sum(mine[name], change) if name in mine else change
        parts = [
            {"method": part.meta.method, "settings": dict(part.meta.settings)}
            for part in (self, other)
        ]
        method = f"{self.meta.method} + {other.meta.method}"
        meta = DeltaMeta(self.meta.base_hash, method, {"merged": parts})
        return WeightDelta(merged, meta, strict=self.strict and other.strict)

    def to_lora(self, rank: int | None = None) -> tuple[Factors, float]:
        """Return LoRA factors and their relative Frobenius error to the changes.

        Low-rank changes of rank <= `rank` are returned as they are; others through the SVD, with
        `rank=None` to their full numerical rank. Raises `SelectionError` when a change is not of
        an `nn.Linear` weight.
        """
        if rank is not None and rank < 1:
            raise SelectionError(f"`rank` must be at least 1, got {rank}")
        factors: Factors = {}
        squared_error = squared_norm = 0.0
        for component, name, change in self._items():
            path = _linear_path(component, name, change)
            close = _low_rank(change, rank)
            exact = close is change
            dense = _dense(change).double()
            squared_norm += dense.square().sum().item()
            if not exact:
                squared_error += (dense - close.dense().double()).square().sum().item()
            factors.setdefault(component, {})[path] = (close.down, close.up)
        return factors, math.sqrt(squared_error / squared_norm) if squared_norm else 0.0

    def save(
        self,
        folder: str | Path,
        *,
        extra: Callable[[Path], object] | None = None,
        content: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `delta.safetensors` and `manifest.json` to `folder`, replacing it whole.

        `extra` may write more files into the folder it is given; they are hashed in the manifest
        too. `content` adds JSON values to the manifest. Raises `ArtifactError` when the folder
        cannot be written or holds files of somebody else.
        """
        with atomic_folder(folder) as new:
            save_tensors(new / DELTA_FILE, self._tensors())
            if extra is not None:
                extra(new)
            meta = {
                "base_hash": self.meta.base_hash,
                "method": self.meta.method,
                "settings": dict(self.meta.settings),
                "versions": dict(self.meta.versions),
            }
            write_manifest(new, {**(content or {}), **meta})

    @classmethod
    def load(cls, folder: str | Path, *, strict: bool = True) -> WeightDelta:
        """Read a delta after verifying the SHA-256 of every file of the artifact.

        With `strict=False` it may be applied to another base model than its own. Raises
        `ArtifactError` naming the file when anything is missing, damaged or exchanged.
        """
        folder = Path(folder)
        for _ in range(_READ_ATTEMPTS):
            seen = _identity(folder)
            try:
                return cls._load_once(folder, strict)
            except ArtifactError:
                if _identity(folder) == seen:
                    raise
        raise ArtifactError(f"the folder {str(folder)!r} is being replaced all the time")

    @classmethod
    def _load_once(cls, folder: Path, strict: bool) -> WeightDelta:
        manifest = read_manifest(folder)
        path = folder / DELTA_FILE
        if DELTA_FILE not in manifest["files"]:
            raise ArtifactError(f"{str(folder)!r} holds no weight delta: {DELTA_FILE!r} is missing")
        tensors = load_tensors(path, sha256=manifest["files"][DELTA_FILE])
        try:
            deltas = _parse_tensors(tensors)
            meta = DeltaMeta(
                manifest["base_hash"],
                manifest["method"],
                manifest["settings"],
                manifest["versions"],
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{str(path)!r} is no weight delta: {error!r}") from error
        return cls(deltas, meta, strict=strict)

    def _items(self) -> list[tuple[str, str, Change]]:
        return [
            (component, name, change)
            for component, changes in self._deltas.items()
            for name, change in changes.items()
        ]

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for component, name, change in self._items():
            key = component + _SEPARATOR + name
            if isinstance(change, LowRank):
                tensors[key + _DOWN], tensors[key + _UP] = change.down, change.up
            else:
                tensors[key] = change
        return tensors

    def _check_base(self, pipe: Pipeline) -> None:
        found = base_model_hash(pipe)
        if found != self.meta.base_hash:
            raise ArtifactError(
                f"this delta ({self.meta.method}) belongs to the base model with hash "
                f"{self.meta.base_hash}, and the pipeline ({pipe.unet.dtype}) has {found}; load "
                "the same model in the same dtype, or pass strict=False to apply it all the same"
            )

    def _check_parameters(self, pipe: Pipeline) -> None:
        for component, changes in self._deltas.items():
            parameters = base_parameters(component, _component(pipe, component))
            for name, change in changes.items():
                if name not in parameters:
                    raise ArtifactError(
                        f"this delta changes {component}.{name}, which the pipeline lacks; it was "
                        f"made on another model, with hash {self.meta.base_hash}, than this one, "
                        f"with {base_model_hash(pipe)}"
                    )
                if parameters[name].shape != change.shape:
                    raise ArtifactError(
                        f"this delta changes {component}.{name} of shape {tuple(change.shape)}, "
                        f"and the pipeline has {tuple(parameters[name].shape)}; it was made on "
                        f"another model, with hash {self.meta.base_hash}, than this one, with "
                        f"{base_model_hash(pipe)}"
                    )


def _component(pipe: Pipeline, component: str) -> nn.Module:
    module = getattr(pipe, component, None)
    if not isinstance(module, nn.Module):
        raise ArtifactError(f"the pipeline has no model called {component!r} to change")
    return module


def _own_copy(component: str, name: str, change: Change) -> Change:
    tensors = (change.down, change.up) if isinstance(change, LowRank) else (change,)
    for tensor in tensors:
        if not tensor.isfinite().all():
            raise NonFiniteError(f"the change of {component}.{name} has NaN or infinite values")
    copies = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in tensors]
    return LowRank(copies[0], copies[1]) if isinstance(change, LowRank) else copies[0]


def _dense(change: Change) -> Tensor:
    return change.dense() if isinstance(change, LowRank) else change


def _sum(first: Change, second: Change) -> Change:
    if first.shape != second.shape:
        raise ArtifactError(
            f"cannot merge changes of shapes {tuple(first.shape)} and {tuple(second.shape)}"
        )
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return LowRank(torch.cat([first.down, second.down]), torch.cat([first.up, second.up], 1))
    return _dense(first) + _dense(second)


@torch.no_grad()
def _recompute(component: str, module: nn.Module, names: Mapping[str, Change]) -> None:
    """Set parameters to originals plus active deltas; forget originals that nothing changes."""
    edits, parameters = edits_of(module), base_parameters(component, module)
    for name in names:
        original = edits.originals[name]
        active = [
            (delta.deltas[component][name], strength)
            for delta, strength in edits.active
            if name in delta.deltas[component]
        ]
        value = original
        for change, strength in active:
            value = value.float() + strength * _dense(change).to(original.device).float()
        parameters[name].copy_(value)
        if not active:
            del edits.originals[name]


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
    dense = _dense(change)
    left, values, right = torch.linalg.svd(dense.double(), full_matrices=False)
    if rank is None:
        tolerance = values[0] * max(dense.shape) * torch.finfo(dense.dtype).eps
        rank = max(1, int((values > tolerance).sum()))
    root = values[:rank].sqrt()
    down = root[:, None] * right[:rank]
    return LowRank(down.to(dense.dtype), (left[:, :rank] * root).to(dense.dtype))


def _parse_tensors(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Change]]:
    deltas: dict[str, dict[str, Change]] = {}
    for key, tensor in tensors.items():
        component, _, name = key.partition(_SEPARATOR)
        if name.endswith(_UP):
            continue
        change: Change = tensor
        if name.endswith(_DOWN):
            name = name.removesuffix(_DOWN)
            change = LowRank(tensor, tensors[component + _SEPARATOR + name + _UP])
        deltas.setdefault(component, {})[name] = change
    return deltas


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what changes when another folder takes the place of this one."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
