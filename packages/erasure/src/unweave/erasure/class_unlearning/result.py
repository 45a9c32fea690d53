"""What class unlearning hands back: changed weights, applied and undone exactly, and a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unweave.diffusion_core.changes import Change, LowRank, misfit
from unweave.diffusion_core.errors import ArtifactError, UnweaveError
from unweave.diffusion_core.files import (
    atomic_write_bytes,
    load_tensors,
    read_manifest,
    save_tensors,
)
from unweave.diffusion_core.keys import base_parameters
from unweave.diffusion_core.originals import (
    apply_delta,
    is_applied,
    original_weights,
    revert_delta,
)
from unweave.diffusion_core.pipelines import hash_weights
from unweave.diffusion_core.weight_delta import DeltaMeta, WeightDelta

COMPONENT = "model"
REPORT_FILE = "concept_report.json"
POISON_FILE = "poison.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class ConceptEntry:
    """One concept: how much it speaks for the target, against other classes, and its accuracy.

    `accuracy` is None for concepts made of text and for words.
    """

    name: str
    importance: float
    contrast: float
    chosen: bool
    accuracy: float | None = None


@dataclass(frozen=True)
class ConceptReport:
    """Which concepts carried the target, what it was relabelled to, and what that did.

    `answers` counts the new labels or answers of the poisoned samples. `facts` holds numbers such
    as the accuracies of the head and of the bottleneck, and why training stopped.
    """

    target: str
    concepts: tuple[ConceptEntry, ...]
    dropped: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, float | int | str | bool] = field(default_factory=dict)

    @property
    def concept_set(self) -> tuple[str, ...]:
        """The chosen concepts `K_u`, the most important first."""
        chosen = [entry for entry in self.concepts if entry.chosen]
        return tuple(e.name for e in sorted(chosen, key=lambda entry: -entry.importance))

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return json.dumps({**asdict(self), "concept_set": self.concept_set}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> ConceptReport:
        """Read what `to_json` wrote."""
        content = json.loads(text)
        concepts = tuple(ConceptEntry(**entry) for entry in content["concepts"])
        return cls(
            content["target"], concepts, content["dropped"], content["answers"], content["facts"]
        )


class AppliedUnlearning:
    """An unlearning that is applied to a model until `revert` or the end of a `with` block."""

    def __init__(self, unlearning: ClassUnlearning, model: nn.Module) -> None:
        """Remember what was applied to which model."""
        self.unlearning, self._model = unlearning, model

    def revert(self) -> None:
        """Undo it; see `ClassUnlearning.revert`."""
        self.unlearning.revert(self._model)

    def __enter__(self) -> AppliedUnlearning:
        """Return self: the change is already applied."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo the change unless that was done inside the block."""
        if self.unlearning.is_applied(self._model):
            self.revert()


class ClassUnlearning:
    """The changed weights of a classifier or language model, with the concept report.

    `history` holds one loss a training step. `poison` holds tensors by which the poisoned data
    can be audited: `indices` into the forget inputs, their new `labels`, and the `protected`
    indices into the retain inputs. `adapter` is the peft configuration of a language model's LoRA.
    """

    def __init__(
        self,
        delta: WeightDelta,
        report: ConceptReport,
        *,
        history: Sequence[float] = (),
        poison: Mapping[str, Tensor] | None = None,
        adapter: Mapping[str, Any] | None = None,
    ) -> None:
        """Gather the parts."""
        self.delta, self.report = delta, report
        self.history = list(history)
        self.poison = dict(poison or {})
        self.adapter = dict(adapter) if adapter else None

    @classmethod
    def from_changes(
        cls,
        model: nn.Module,
        changes: Mapping[str, Change],
        report: ConceptReport,
        *,
        method: str,
        settings: Mapping[str, Any],
        **parts: Any,
    ) -> ClassUnlearning:
        """Return the unlearning made of `changes` by parameter name of the unchanged `model`."""
        meta = DeltaMeta(model_hash(model), method, dict(settings))
        return cls(WeightDelta({COMPONENT: changes}, meta), report, **parts)

    def apply(self, model: nn.Module, strength: float = 1.0) -> AppliedUnlearning:
        """Change the weights of `model`, keeping the originals.

        The result undoes it at the end of a `with` block. Raises `ArtifactError` for another model
        than the unlearning was made for, `UnweaveError` when it is applied already.
        """
        if self.is_applied(model):
            raise UnweaveError("this unlearning is applied to this model already: revert it first")
        problem = misfit(self.delta.deltas[COMPONENT], base_parameters(COMPONENT, model))
        found = model_hash(model)
        if problem or found != self.delta.meta.base_hash:
            raise ArtifactError(
                f"this unlearning ({self.delta.meta.method}) belongs to the model with hash "
                f"{self.delta.meta.base_hash}, and this {type(model).__name__} has {found}"
                f"{f': it changes {problem}' if problem else ''}; load the same model in the same "
                "dtype"
            )
        apply_delta(COMPONENT, model, self.delta, float(strength))
        return AppliedUnlearning(self, model)

    def revert(self, model: nn.Module) -> None:
        """Restore the weights of `model` bit by bit. Raises `UnweaveError` when not applied."""
        if not self.is_applied(model):
            raise UnweaveError("this unlearning is not applied to this model: nothing to revert")
        revert_delta(COMPONENT, model, self.delta)

    def is_applied(self, model: nn.Module) -> bool:
        """Return whether this very object is applied to `model` now."""
        return is_applied(model, self.delta)

    def save(self, folder: str | Path) -> None:
        """Write the artifact to `folder`, replacing it whole, with a SHA-256 of every file.

        Beside the delta there are `concept_report.json`, `poison.safetensors` and, for language
        models, the adapter that `peft.PeftModel.from_pretrained` reads.
        """
        self.delta.save(
            folder,
            extra=self._save_extras,
            content={"history": self.history, "adapter": self.adapter},
        )

    @classmethod
    def load(cls, folder: str | Path) -> ClassUnlearning:
        """Read an unlearning, verifying every file. Raises `ArtifactError` naming a bad one."""
        folder = Path(folder)
        delta = WeightDelta.load(folder)
        manifest = read_manifest(folder)
        if COMPONENT not in delta.deltas or REPORT_FILE not in manifest["files"]:
            raise ArtifactError(
                f"{str(folder)!r} holds a weight delta but no class unlearning: load it with "
                "Erasure.load or WeightDelta.load"
            )
        report = ConceptReport.from_json((folder / REPORT_FILE).read_text(encoding="utf-8"))
        poison_hash = manifest["files"].get(POISON_FILE)
        return cls(
            delta,
            report,
            history=manifest["history"],
            poison=load_tensors(folder / POISON_FILE, sha256=poison_hash) if poison_hash else {},
            adapter=manifest["adapter"],
        )

    def _save_extras(self, folder: Path) -> None:
        atomic_write_bytes(folder / REPORT_FILE, self.report.to_json().encode() + b"\n")
        if self.poison:
            save_tensors(folder / POISON_FILE, self.poison)
        if self.adapter is not None:
            _save_adapter(folder, self.delta.deltas[COMPONENT], self.adapter)


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the weights of `model` as they are without any unlearning."""
    current = {name: p.detach() for name, p in base_parameters(COMPONENT, model).items()}
    return hash_weights({COMPONENT: {**current, **original_weights(model)}})


@torch.no_grad()
def _save_adapter(folder: Path, changes: Mapping[str, Change], settings: Mapping[str, Any]) -> None:
    from peft import LoraConfig

    LoraConfig(**settings).save_pretrained(str(folder))
    tensors = {}
    for name, change in changes.items():
        if not isinstance(change, LowRank):
            raise ArtifactError(f"{name!r} is no low-rank change, so cannot be saved as a LoRA")
        down, up = change.down, change.up
        if settings["fan_in_fan_out"]:
            down, up = up.T, down.T
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = down, up
    save_tensors(folder / ADAPTER_FILE, tensors, {"format": "pt"})
