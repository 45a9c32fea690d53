"""What weight deltas change in a module now: the unedited weights, and how to return to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unweave.diffusion_core.changes import as_dense
from unweave.diffusion_core.keys import base_parameters

if TYPE_CHECKING:
    from unweave.diffusion_core.weight_delta import WeightDelta


@dataclass
class Edits:
    """What is applied to one module: stored originals and the active deltas in order.

    `originals` maps canonical parameter names to bit-exact copies; `active` holds
    (delta, strength) pairs.
    """

    originals: dict[str, Tensor] = field(default_factory=dict)
    active: list[tuple[WeightDelta, float]] = field(default_factory=list)


_EDITS: WeakKeyDictionary[nn.Module, Edits] = WeakKeyDictionary()


def edits_of(module: nn.Module) -> Edits:
    """Return the edits of `module`, an empty record when it has none yet."""
    return _EDITS.setdefault(module, Edits())


def original_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the stored originals of the edited parameters of `module` by canonical name."""
    edits = _EDITS.get(module)
    return dict(edits.originals) if edits else {}


def apply_delta(component: str, module: nn.Module, delta: WeightDelta, strength: float) -> None:
    """Add `strength` times what `delta` changes in the module of `component`."""
    edits, parameters = edits_of(module), base_parameters(component, module)
    names = delta.deltas[component].keys()
    for name in names - edits.originals.keys():
        edits.originals[name] = parameters[name].detach().clone()
    edits.active.append((delta, strength))
    _recompute(component, module, names)


def revert_delta(component: str, module: nn.Module, delta: WeightDelta) -> None:
    """Take `delta` out of the module of `component`."""
    edits = edits_of(module)
    edits.active = [pair for pair in edits.active if pair[0] is not delta]
    _recompute(component, module, delta.deltas[component])


def is_applied(module: nn.Module, delta: WeightDelta) -> bool:
    """Return whether this very delta is applied to `module` now."""
    return any(active is delta for active, _ in edits_of(module).active)


@torch.no_grad()
def _recompute(component: str, module: nn.Module, names: Iterable[str]) -> None:
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
            value = value.float() + strength * as_dense(change).to(original.device).float()
        parameters[name].copy_(value)
        if not active:
            del edits.originals[name]
