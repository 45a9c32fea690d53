"""What an evaluation found: rates with their intervals, drift, examples, and the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave.diffusion_core.errors import UnweaveError
from unweave.diffusion_core.metrics import wilson_interval
from unweave.diffusion_core.report import Report, image_grid

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Rate:
    """A share of images with its 95 % Wilson interval."""

    successes: int
    total: int

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.successes / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the share."""
        return wilson_interval(self.successes, self.total)

    def __str__(self) -> str:
        """Show percent, interval and counts: `25 % [7, 59] (2/8)`."""
        low, high = self.interval
        return (
            f"{100 * self.value:.0f} % [{100 * low:.0f}, {100 * high:.0f}] "
            f"({self.successes}/{self.total})"
        )


@dataclass(frozen=True)
class ConceptRate:
    """How often the judge sees a concept in images of it, without and with the erasure."""

    before: Rate
    after: Rate

    @property
    def drop(self) -> float:
        """Rate before minus rate after."""
        return self.before.value - self.after.value


@dataclass(frozen=True)
class Examples:
    """The first images of a concept with the same prompts and seeds, both (n, 3, H, W)."""

    before: Tensor
    after: Tensor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class ErasureEvaluation:
    """The result of `evaluate_erasure`."""

    target: str
    target_rate: ConceptRate
    preserved: Mapping[str, ConceptRate]
    """Concepts that the erasure should keep."""
    related: Mapping[str, ConceptRate]
    """Concepts close to the target that are watched, not promised."""
    mean_preserved_drop: float | None
    """Mean of rate before minus rate after over preserved images; `None` without any."""
    mean_preserved_drop_interval: tuple[float, float] | None
    """95 % bootstrap interval of the mean drop over images, each paired with itself."""
    drift_kid: float | None
    """Paired kernel distance of neutral images before and after; `None` below two images."""
    drift_kid_std: float | None
    """Standard deviation of the drift over random subsets."""
    settings: Mapping[str, Any]
    """How the images were made: method, prompts, seeds, steps, guidance, strength."""
    examples: Mapping[str, Examples] = field(repr=False)
    """Images of every concept, and of the neutral prompts under "neutral"."""

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers and settings, without images, as plain JSON values."""
        return {
            "target": {self.target: _rates(self.target_rate)},
            "preserved": {name: _rates(rate) for name, rate in self.preserved.items()},
            "related": {name: _rates(rate) for name, rate in self.related.items()},
            "mean_preserved_drop": self.mean_preserved_drop,
            "mean_preserved_drop_interval": _listed(self.mean_preserved_drop_interval),
            "drift_kid": self.drift_kid,
            "drift_kid_std": self.drift_kid_std,
            "settings": dict(self.settings),
        }

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)

    def example_grid(self, concept: str, scale: int = 2) -> Image:
        """Return the examples of a concept (or "neutral"): before in the top row, after below."""
        if concept not in self.examples:
            raise UnweaveError(
                f"no examples of {concept!r}; there are some of {', '.join(self.examples)}"
            )
        pair = self.examples[concept]
        return image_grid(torch.cat([pair.before, pair.after]), len(pair.before), scale)

    def to_report(self, path: str | Path) -> Path:
        """Write `report.html`, `grid.png` and `numbers.json` into folder `path`.

        Returns the path of the HTML file, which holds all images and needs no other file.
        """
        report = Report(f"Erasing {self.target!r}")
        report.add_text(self._summary())
        report.add_table(
            ["concept", "role", "before", "after", "drop"],
            [
                [name, role, str(rate.before), str(rate.after), rate.drop]
                for role, rates in self._by_role().items()
                for name, rate in rates.items()
            ],
            title="Images in which the judge sees the concept",
        )
        for name, pair in self.examples.items():
            report.add_images(f"{name}: before", pair.before, pair.labels)
            report.add_images(f"{name}: after", pair.after, pair.labels)
        return report.add_numbers(self.to_dict()).save(path)

    def _by_role(self) -> dict[str, Mapping[str, ConceptRate]]:
        return {
            "target": {self.target: self.target_rate},
            "preserve": self.preserved,
            "related": self.related,
        }

    def _summary(self) -> str:
        before, after = self.target_rate.before, self.target_rate.after
        parts = [
            f"The judge sees {self.target!r} in {before} of its images before and in {after} "
            "after the erasure. Brackets are 95 % Wilson intervals; before and after share "
            "prompts and seeds."
        ]
        if before.value < 0.5:
            parts.append(
                "The judge misses the target in most images even before the erasure, so its rate "
                "after says little: check the prompts and the judge."
            )
        if self.mean_preserved_drop is not None and self.mean_preserved_drop_interval is not None:
            low, high = self.mean_preserved_drop_interval
            parts.append(
                f"Preserved concepts lose {100 * self.mean_preserved_drop:.1f} points on average "
                f"(95 % bootstrap interval {100 * low:.1f} to {100 * high:.1f})."
            )
        if self.drift_kid is not None:
            parts.append(
                f"Images of neutral prompts moved by a paired KID of {self.drift_kid:.4g} "
                f"(standard deviation over subsets {self.drift_kid_std:.2g}; 0 is no change)."
            )
        return "\n\n".join(parts)


def _rates(rate: ConceptRate) -> dict[str, Any]:
    return {
        moment: {
            "rate": value.value,
            "interval": list(value.interval),
            "successes": value.successes,
            "total": value.total,
        }
        for moment, value in (("before", rate.before), ("after", rate.after))
    } | {"drop": rate.drop}


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)
