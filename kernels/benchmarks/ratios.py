"""Claims that one way is so many times better than another."""

from __future__ import annotations

from claims_runner import Claim

BUSY = "not reached at every size: the setting has each"


def at_least(name: str, text: str, source: str, setting: str, value: float, limit: float) -> Claim:
    """A claim that a ratio is at least `limit`."""
    return Claim(
        id=name,
        text=text,
        source=source,
        setting=setting,
        aim=f">= {limit:g}x",
        measured=f"{value:.2f}x",
        interval=None,
        holds=value >= limit,
        note="" if value >= limit else BUSY,
    )


def listed(ratios: dict[int, float]) -> str:
    """Ratios by number of queries."""
    return ", ".join(f"{ratio:.2f}x at {queries}" for queries, ratio in ratios.items())
