"""Compiled loops over rows: Numba functions without the interpreter's lock, on torch's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, update_wrapper
from itertools import pairwise
from typing import Any

import torch

GRAIN = 1 << 14
"""The least work, in elements, that is worth a thread of its own."""


class Loop:
    """A loop `function(first, last, *arrays)` over rows, compiled at its first call.

    Each thread has its own rows, so results do not depend on how many threads there are. Threads
    end with the call: nothing is left that a fork could break. Pickled by name, as functions are.
    With `fastmath` sums are taken in the order that is fastest on the processor, which loops that
    reduce a row to one number need; what is not finite stays so.
    """

    def __init__(self, function: Callable[..., None], *, fastmath: bool = False) -> None:
        self.function = function
        self.options: dict[str, Any] = {"nogil": True}
        if fastmath:
            self.options["fastmath"] = {"reassoc", "contract"}
        update_wrapper(self, function)

    def __reduce__(self) -> str:
        return self.function.__qualname__

    @cached_property
    def compiled(self) -> Callable[..., None]:
        """The machine code, from Numba's cache where it can be written."""
        from numba import njit

        try:
            compiled: Callable[..., None] = njit(cache=True, **self.options)(self.function)
        except RuntimeError:
            compiled = njit(**self.options)(self.function)
        return compiled

    def __call__(self, rows: int, work: int, *arrays: Any) -> None:
        """Loop over `rows` rows of about `work` elements each, split evenly."""
        threads = max(1, min(torch.get_num_threads(), rows, rows * work // GRAIN))
        self.over([rows * part // threads for part in range(threads + 1)], *arrays)

    def over(self, bounds: Sequence[int], *arrays: Any) -> None:
        """Loop over the rows between each two successive `bounds`, a thread for each part."""
        values = [_shared(array) for array in arrays]
        parts = list(pairwise(bounds))
        if len(parts) == 1:
            self.compiled(*parts[0], *values)
            return
        with ThreadPoolExecutor(len(parts)) as pool:
            for done in [pool.submit(self.compiled, *part, *values) for part in parts]:
                done.result()


def _shared(value: Any) -> Any:
    return value.detach().numpy() if isinstance(value, torch.Tensor) else value
