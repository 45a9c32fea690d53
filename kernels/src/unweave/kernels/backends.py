"""Which implementation of a routine runs: its definition, or a fast form for one kind of device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

BACKENDS = ("auto", "reference", "cpu", "cuda")
"""What can be chosen: `auto` takes the fast form for the device of the tensors, if there is one."""

VARIABLE = "UNWEAVE_BACKEND"
"""The environment variable that chooses a backend where no `use_backend` does."""

NEEDS = {"numba": "numba", "cupy": "cuda"}
"""Libraries that fast forms may need, and the extra of this package that installs each."""

_chosen: ContextVar[str | None] = ContextVar("unweave_backend", default=None)


class BackendError(ValueError):
    """A backend that does not exist, or that cannot work on the given tensors."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every routine in the block by one backend.

    Raises `BackendError` for a name that is not in `BACKENDS`.

    >>> with use_backend("reference"):
    ...     resolve("cpu")
    'reference'
    """
    token = _chosen.set(_checked(name, "`name`"))
    try:
        yield
    finally:
        _chosen.reset(token)


def resolve(
    device: torch.device | str,
    fast: tuple[str, ...] = ("cpu", "cuda"),
    needs: dict[str, str] | None = None,
) -> str:
    """Return the backend for tensors on `device` of a routine that has the `fast` forms.

    `needs` names the library that a form imports. A device or routine without a fast form, or
    whose library is not installed, gets "reference". Raises `BackendError` when a backend was
    chosen by name that does not work on `device`, that the routine does not have, or whose library
    is missing. A compiled graph keeps what was chosen when it was compiled.
    """
    kind = torch.device(device).type
    wanted = _wanted()
    if wanted == "reference":
        return wanted
    library = (needs or {}).get(kind)
    if wanted == "auto":
        return kind if kind in fast and (not library or _installed(library)) else "reference"
    if wanted != kind:
        raise BackendError(
            f"the backend {wanted!r} was chosen, but the tensors are on {kind!r}; move them, or "
            'choose "auto" or "reference"'
        )
    if wanted not in fast:
        raise BackendError(
            f'this routine has no {wanted!r} form; choose "auto", which then takes its reference'
        )
    if library and not _installed(library):
        raise BackendError(
            f"the {wanted!r} form of this routine needs {library}: "
            f'pip install "unweave-kernels[{NEEDS[library]}]"'
        )
    return wanted


def is_automatic() -> bool:
    """Return whether no backend was chosen by name."""
    return _wanted() == "auto"


def operator(name: str, function: Callable[..., Any], empty: Callable[..., Any]) -> Any:
    """Return `function` as the torch operator `unweave::name`, which changes no argument.

    Its annotations are its schema; `empty` takes the same arguments and returns tensors of the
    shapes and dtypes of the results.
    """
    made = torch.library.custom_op(f"unweave::{name}", function, mutates_args=())
    made.register_fake(empty)
    return made


def _installed(library: str) -> bool:
    return _found(library)


@cache
def _found(library: str) -> bool:
    return find_spec(library) is not None


def _wanted() -> str:
    return _chosen.get() or _checked(os.environ.get(VARIABLE, "auto"), VARIABLE)


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"{source} must be one of {BACKENDS}, got {name!r}")
    return name


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: a second.
for _constant in (_wanted, _installed):
    vars(_constant)["_dynamo_marked_constant"] = True
