"""The unedited weights of every module that a weight delta currently changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn


@dataclass
class Edits:
    """What is applied to one module: stored originals and the active deltas in order.

    `originals` maps canonical parameter names to bit-exact copies; `active` holds
    (delta, strength) pairs.
    """

    originals: dict[str, Tensor] = field(default_factory=dict)
    active: list[tuple[Any, float]] = field(default_factory=list)


_EDITS: WeakKeyDictionary[nn.Module, Edits] = WeakKeyDictionary()


def edits_of(module: nn.Module) -> Edits:
    """Return the edits of `module`, an empty record when it has none yet."""
    return _EDITS.setdefault(module, Edits())


def original_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the stored originals of the edited parameters of `module` by canonical name."""
    edits = _EDITS.get(module)
    return dict(edits.originals) if edits else {}
