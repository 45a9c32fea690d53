"""Checks of arguments that routines share."""

from __future__ import annotations

from torch import Tensor


def require_one_kind(first: str, one: Tensor, second: str, other: Tensor) -> None:
    """Raise `ValueError` unless both are of one floating dtype, on one device."""
    kinds = (one.dtype, one.device), (other.dtype, other.device)
    if kinds[0] != kinds[1] or not one.is_floating_point():
        raise ValueError(
            f"`{first}` and `{second}` must have one floating dtype and device, got {one.dtype} on "
            f"{one.device} and {other.dtype} on {other.device}"
        )
