"""Compiled loops over rows: Numba functions without the interpreter's lock, on torch's threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

GRAIN = 1 << 14
"""The least work, in elements, that is worth a thread of its own."""


class Loop:
    """A loop `function(first, last, *arrays)` over rows, compiled at its first call.

    Each thread has its own rows, so results do not depend on how many threads there are. Threads
    end with the call: nothing is left that a fork could break.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Callable[..., None]:
        """The machine code, from Numba's cache where it can be written."""
        from numba import njit

        try:
            return njit(nogil=True, cache=True)(self.function)
        except RuntimeError:
            return njit(nogil=True)(self.function)

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
