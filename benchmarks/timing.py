"""Times and memory of two ways to do one thing, side by side in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], Any]


def median_seconds(*works: Work, repeats: int = 11) -> list[float]:
    """Return the median seconds of each of `works`, run in turns after one round that is not timed.

    Turns share whatever slows the machine down, so ratios hold better than times.
    """
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for own, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            own.append(time.perf_counter() - start)
    return [median(own) for own in times]


def peak_bytes(work: Work) -> int:
    """Return the most bytes of CPU tensors that `work` holds at once, beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = work()
    del kept
    held = most = 0
    events = recorded.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            held += event.nbytes()
            most = max(most, held)
    return most
