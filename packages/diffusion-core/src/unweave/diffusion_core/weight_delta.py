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

from unweave.diffusion_core.changes import (
    Change,
    Changes,
    Factors,
    LowRank,
    flat,
    from_tensors,
    lora_factors,
    merged,
    misfit,
    own_copies,
    to_tensors,
)
from unweave.diffusion_core.errors import ArtifactError, SelectionError, UnweaveError
from unweave.diffusion_core.files import (
    atomic_folder,
    load_tensors,
    read_manifest,
    save_tensors,
    write_manifest,
)
from unweave.diffusion_core.keys import base_parameters, canonical_key
from unweave.diffusion_core.originals import apply_delta, is_applied, revert_delta
from unweave.diffusion_core.pipelines import (
    Pipeline,
    base_model_hash,
    base_weights,
    hash_weights,
    hashed_components,
)

DELTA_FILE = "delta.safetensors"
_PACKAGES = ("unweave-diffusion-core", "torch", "diffusers", "transformers")
_READ_ATTEMPTS = 20


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

    def __init__(self, deltas: Changes, meta: DeltaMeta, *, strict: bool = True) -> None:
        """Check and copy the changes; `strict=False` lets the delta be applied to any base model.

        Raises `NonFiniteError` for NaN or infinite changes, `SelectionError` for none at all.
        """
        self._deltas = own_copies(deltas)
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
    def deltas(self) -> Changes:
        """The changes, {component: {canonical parameter name: change}}, read-only."""
        return MappingProxyType({key: MappingProxyType(val) for key, val in self._deltas.items()})

    @property
    def low_rank(self) -> bool:
        """Whether every change is stored as low-rank factors, hence exactly a LoRA."""
        return all(isinstance(change, LowRank) for _, _, change in flat(self._deltas))

    @property
    def num_bytes(self) -> int:
        """The size of all changes, low-rank ones by their factors."""
        parts = (
            part
            for _, _, change in flat(self.deltas)
            for part in ((change.down, change.up) if isinstance(change, LowRank) else (change,))
        )
        return sum(part.numel() * part.element_size() for part in parts)

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
        for component in self._deltas:
            apply_delta(component, _component(pipe, component), self, float(strength))
        return AppliedDelta(self, pipe)

    def revert(self, pipe: Pipeline) -> None:
        """Take this delta out of `pipe`; without any delta left, weights are the stored originals.

        Raises `UnweaveError` when the delta is not applied to `pipe`.
        """
        if not self.is_applied(pipe):
            raise UnweaveError("this delta is not applied to this pipeline, so cannot be reverted")
        for component in self._deltas:
            revert_delta(component, _component(pipe, component), self)

    def is_applied(self, pipe: Pipeline) -> bool:
        """Return whether this very object is applied to `pipe` now."""
        return any(is_applied(_component(pipe, component), self) for component in self._deltas)

    def merge(self, other: WeightDelta) -> WeightDelta:
        """Return one delta with the changes of both; low-rank factors stay low-rank.

        Raises `ArtifactError` when the two belong to different base models.
        """
        if self.meta.base_hash != other.meta.base_hash:
            raise ArtifactError(
                f"cannot merge deltas of two base models, {self.meta.base_hash} and "
                f"{other.meta.base_hash}"
            )
        changes = merged(self._deltas, other._deltas)
        parts = [
            {"method": part.meta.method, "settings": dict(part.meta.settings)}
            for part in (self, other)
        ]
        method = f"{self.meta.method} + {other.meta.method}"
        meta = DeltaMeta(self.meta.base_hash, method, {"merged": parts})
        return WeightDelta(changes, meta, strict=self.strict and other.strict)

    def to_lora(self, rank: int | None = None) -> tuple[Factors, float]:
        """Return LoRA factors and their relative Frobenius error to the changes.

        Low-rank changes of rank <= `rank` are returned as they are; others through the SVD, with
        `rank=None` to their full numerical rank. Raises `SelectionError` when a change is not of
        an `nn.Linear` weight.
        """
        return lora_factors(self._deltas, rank)

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
            save_tensors(new / DELTA_FILE, to_tensors(self._deltas))
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
            deltas = from_tensors(tensors)
            meta = DeltaMeta(
                manifest["base_hash"],
                manifest["method"],
                manifest["settings"],
                manifest["versions"],
            )
        except (KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{str(path)!r} is no weight delta: {error!r}") from error
        return cls(deltas, meta, strict=strict)

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
            problem = misfit(changes, base_parameters(component, _component(pipe, component)))
            if problem:
                raise ArtifactError(
                    f"this delta changes {component}.{problem}; it was made on another model, with "
                    f"hash {self.meta.base_hash}, than this one, with {base_model_hash(pipe)}"
                )


def _component(pipe: Pipeline, component: str) -> nn.Module:
    module = getattr(pipe, component, None)
    if not isinstance(module, nn.Module):
        raise ArtifactError(f"the pipeline has no model called {component!r} to change")
    return module


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what changes when another folder takes the place of this one."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns
