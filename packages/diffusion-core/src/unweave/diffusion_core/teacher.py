"""A frozen copy of a model that costs memory only for the parameters that will be trained."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from unweave.diffusion_core.errors import SelectionError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_teacher(module: ModuleT, trainable_names: Iterable[str]) -> ModuleT:
    """Return `module` as it is now, in eval mode and without gradients.

    Parameters in `trainable_names` (as in `module.named_parameters()`) are copied, so that
    training them in `module` leaves the teacher as it was; every other tensor is shared. Changing
    a shared tensor changes both. Raises `SelectionError` for unknown names.
    """
    names = set(trainable_names)
    known = dict(module.named_parameters(remove_duplicate=False))
    unknown = sorted(names - known.keys())
    if unknown:
        raise SelectionError(f"`trainable_names` holds {unknown[0]!r}, which is no parameter")
    copied = {id(known[name]) for name in names}
    memo: dict[int, object] = {id(buffer): buffer for buffer in module.buffers()}
    for parameter in known.values():
        data = parameter.detach()
        shown = data.clone() if id(parameter) in copied else data
        memo[id(parameter)] = nn.Parameter(shown, requires_grad=False)
    with torch.no_grad():
        teacher = copy.deepcopy(module, memo)
    return teacher.eval()
