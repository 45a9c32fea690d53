"""What every eraser takes and gives: a request, and an erasure that is applied and undone."""

from __future__ import annotations

import copy
import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from unweave.diffusion_core.changes import as_dense
from unweave.diffusion_core.errors import (
    ArtifactError,
    PipelineError,
    PromptError,
    UnweaveError,
)
from unweave.diffusion_core.files import atomic_write_bytes, read_manifest, save_tensors
from unweave.diffusion_core.keys import base_parameters, canonical_text_encoder_key
from unweave.diffusion_core.lora import save_lora
from unweave.diffusion_core.pipelines import Pipeline
from unweave.diffusion_core.weight_delta import AppliedDelta, WeightDelta

if TYPE_CHECKING:
    from transformers import CLIPTextModel

TEXT_ENCODER_FOLDER = "text_encoder"
LOSS_FILE = "losses.csv"
KINDS = ("object", "style")
"""What can be erased."""


@dataclass(frozen=True)
class ErasureRequest:
    """What to erase, what to put in its place and what to keep.

    `target` is the concept's name as it appears in prompts. `replacement` is the concept that
    closed-form and guided erasers put in its place; None leaves that to the eraser. `preserve`
    names concepts that must stay. `images` are about four images of the target (paths, PIL
    images or tensors) for erasers that learn from images. Raises `PromptError` for empty names.
    """

    target: str
    replacement: str | None = None
    preserve: tuple[str, ...] = ()
    images: Sequence[Any] | None = field(default=None, compare=False, repr=False)
    kind: Literal["object", "style"] = "object"

    def __post_init__(self) -> None:
        if isinstance(self.preserve, str):
            raise PromptError(
                f'`preserve` must be a tuple of concepts such as ("dog",), got {self.preserve!r}'
            )
        object.__setattr__(self, "preserve", tuple(self.preserve))
        for name, concept in [("target", self.target), *(("preserve", c) for c in self.preserve)]:
            if not isinstance(concept, str) or not concept.strip():
                raise PromptError(f"`{name}` must name a concept, got {concept!r}")
        if self.replacement is not None and not isinstance(self.replacement, str):
            raise PromptError(f"`replacement` must be a text or None, got {self.replacement!r}")
        same = self.target.strip().casefold()
        if same in {concept.strip().casefold() for concept in self.preserve}:
            raise PromptError(f"{self.target!r} cannot be erased and preserved at once")
        if self.replacement is not None and self.replacement.strip().casefold() == same:
            raise PromptError(f"{self.target!r} cannot be replaced by itself")
        if self.kind not in KINDS:
            raise PromptError(f"`kind` must be one of {KINDS}, got {self.kind!r}")


class Eraser(Protocol):
    """A method of erasing: settings in the constructor, then `erase` as often as wanted."""

    name: ClassVar[str]
    config_class: ClassVar[type[Any]]

    def erase(
        self,
        pipe: Pipeline,
        request: ErasureRequest,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> Erasure:
        """Work out the erasure of `request`; `pipe` is left bit-identical until it is applied."""
        ...


class Erasure:
    """An erasure: a weight delta with its request, the losses of its training and its epochs.

    `history` holds one loss a training step, empty for closed forms. `keep_epochs` holds the
    weight delta after each epoch, the last being the delta itself, for erasers that have epochs.
    """

    def __init__(
        self,
        delta: WeightDelta,
        request: ErasureRequest,
        *,
        history: Sequence[float] = (),
        keep_epochs: Sequence[WeightDelta] = (),
        base_text_encoder: CLIPTextModel | None = None,
    ) -> None:
        """Gather the parts; with `base_text_encoder`, `save` writes the edited encoder too."""
        self.delta = delta
        self.request = request
        self.history = list(history)
        self.keep_epochs = list(keep_epochs)
        self._base_text_encoder = base_text_encoder
        self._text_encoder_folder: Path | None = None

    def apply(self, pipe: Pipeline, strength: float = 1.0) -> AppliedDelta:
        """Erase the concept in `pipe`; `strength` scales the edit.

        The result undoes it at the end of a `with` block. Raises `ArtifactError` on another base
        model than the erasure was made for.
        """
        return self.delta.apply(pipe, strength)

    def revert(self, pipe: Pipeline) -> None:
        """Restore the weights of `pipe` bit by bit. Raises `UnweaveError` when not applied."""
        self.delta.revert(pipe)

    def at_epoch(self, epoch: int) -> Erasure:
        """Return the erasure as it was after `epoch` (from 1): a milder one than the last.

        Raises `ArtifactError` when that epoch was not kept; loaded erasures keep the last only.
        """
        if not 1 <= epoch <= len(self.keep_epochs):
            raise ArtifactError(
                f"`epoch` must be from 1 to {len(self.keep_epochs)}, the epochs that this erasure "
                f"keeps, got {epoch}; epochs are kept in memory, by erasers that have them"
            )
        steps = len(self.history) * epoch // len(self.keep_epochs)
        return Erasure(
            self.keep_epochs[epoch - 1],
            self.request,
            history=self.history[:steps],
            keep_epochs=self.keep_epochs[:epoch],
            base_text_encoder=self._base_text_encoder,
        )

    def text_encoder(self) -> CLIPTextModel | None:
        """Return the edited text encoder on the CPU; None when the eraser does not edit it."""
        if self._base_text_encoder is not None:
            return _edited(self._base_text_encoder, self.delta)
        if self._text_encoder_folder is not None:
            return _load_text_encoder(self._text_encoder_folder)
        return None

    def save(self, folder: str | Path) -> None:
        """Write the artifact to `folder`, replacing it whole, with a SHA-256 of every file.

        Beside the delta there is a `pytorch_lora_weights.safetensors` that any diffusers loader
        reads when the edit is of low rank, and a `text_encoder` folder for
        `from_pretrained(..., text_encoder=...)` when the text encoder was edited.
        """
        request = {
            "target": self.request.target,
            "replacement": self.request.replacement,
            "preserve": list(self.request.preserve),
            "kind": self.request.kind,
        }
        self.delta.save(
            folder, extra=self._save_extras, content={"request": request, "history": self.history}
        )

    @classmethod
    def load(cls, folder: str | Path) -> Erasure:
        """Read an erasure after verifying every file. Raises `ArtifactError` naming a bad one."""
        folder = Path(folder)
        delta = WeightDelta.load(folder)
        manifest = read_manifest(folder)
        try:
            stored = manifest["request"]
            request = ErasureRequest(**{**stored, "preserve": tuple(stored["preserve"])})
            history = [float(loss) for loss in manifest["history"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{str(folder)!r} holds a weight delta but no erasure: {error!r}; load it with "
                "WeightDelta.load"
            ) from error
        erasure = cls(delta, request, history=history)
        if f"{TEXT_ENCODER_FOLDER}/config.json" in manifest["files"]:
            erasure._text_encoder_folder = folder / TEXT_ENCODER_FOLDER
        return erasure

    def _save_extras(self, folder: Path) -> None:
        if self.delta.low_rank:
            factors, _ = self.delta.to_lora()
            save_lora(folder, factors.get("unet", {}), factors.get("text_encoder", {}))
        text_encoder = self.text_encoder()
        if text_encoder is not None:
            _save_text_encoder(folder / TEXT_ENCODER_FOLDER, text_encoder)
        if self.history:
            table = io.StringIO()
            csv.writer(table).writerows([("step", "loss"), *enumerate(self.history)])
            atomic_write_bytes(folder / LOSS_FILE, table.getvalue().encode())


def check_pipeline(pipe: Pipeline) -> None:
    """Raise `PipelineError` for a pipeline without U-Net or without its first text encoder."""
    for part in ("unet", "text_encoder"):
        if getattr(pipe, part, None) is None:
            raise PipelineError(
                f"this {type(pipe).__name__} has no `{part}`; erasers work on Stable Diffusion "
                "1.x, 2.x and XL pipelines, not on refiners and not on transformers"
            )


def check_trainable(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise `PipelineError` unless all `parameters` are float32, as training needs."""
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            raise PipelineError(
                f"{name} has dtype {parameter.dtype}, in which small updates are lost; load the "
                "pipeline with dtype=torch.float32"
            )


@contextmanager
def restored(parameters: Mapping[str, nn.Parameter]) -> Iterator[dict[str, Tensor]]:
    """Yield copies of `parameters` by name and put them back bit by bit at the end."""
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield originals
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(originals[name])


def changes_since(
    originals: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Return the float32 changes of those `parameters` that are not as in `originals`."""
    return {
        base_name(name): parameter.detach().float() - originals[name].float()
        for name, parameter in parameters.items()
        if not torch.equal(parameter.detach(), originals[name])
    }


def base_name(name: str) -> str:
    """Return the name that a parameter has in the base model, without the layer of an adapter."""
    return name.replace(".base_layer.", ".")


def check_number(name: str, value: float, rule: str, holds: Callable[[float], bool]) -> None:
    """Raise `UnweaveError` unless `value` is a finite number for which `holds` is true."""
    if isinstance(value, bool) or not math.isfinite(value) or not holds(value):
        raise UnweaveError(f"`{name}` must be {rule}, got {value!r}")


def _edited(base: CLIPTextModel, delta: WeightDelta) -> CLIPTextModel:
    edited = copy.deepcopy(base)
    parameters = base_parameters(TEXT_ENCODER_FOLDER, edited)
    with torch.no_grad():
        for name, change in delta.deltas.get(TEXT_ENCODER_FOLDER, {}).items():
            parameters[name].copy_(parameters[name].float() + as_dense(change).float())
    return edited


def _save_text_encoder(folder: Path, text_encoder: CLIPTextModel) -> None:
    """Write a Hugging Face folder whose keys old and new versions of transformers both read."""
    folder.mkdir(parents=True, exist_ok=True)
    text_encoder.config.architectures = [type(text_encoder).__name__]
    text_encoder.config.dtype = text_encoder.dtype
    text_encoder.config.save_pretrained(folder)
    tensors = {
        canonical_text_encoder_key(name): tensor
        for name, tensor in text_encoder.state_dict().items()
    }
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


def _load_text_encoder(folder: Path) -> CLIPTextModel:
    from transformers import CLIPTextModel

    model: CLIPTextModel = CLIPTextModel.from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    )
    return model
