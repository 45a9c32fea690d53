"""A leaderboard of erasers: what each removes, keeps and costs, over objects crossed with styles.

The protocol is that of UnlearnCanvas (arXiv 2402.11846): every erased model draws every object in
every style, so that one set of images tells how well the target is gone (UA), whether other
concepts of its domain stay (IRA), and whether the other domain stays (CRA).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.diffusion_core.errors import PromptError, UnweaveError
from unweave.diffusion_core.metrics import bootstrap_interval
from unweave.diffusion_core.pipelines import Pipeline, generate
from unweave.erasure.evaluation import Judge
from unweave.erasure.protocol import Eraser, ErasureRequest

Kind = Literal["object", "style"]
AXES: dict[Kind, int] = {"object": 0, "style": 1}
SCORES = ("ua", "ira", "cra", "harmonic_mean")


@dataclass(frozen=True)
class Canvas:
    """Objects crossed with styles, how a prompt names both, and who says what an image shows.

    `phrases` are how prompts name the objects, such as "an apple" for "apple". Raises `PromptError`
    unless there are at least two of each and the template has both places.
    """

    objects: tuple[str, ...]
    styles: tuple[str, ...]
    judges: Mapping[Kind, Judge] = field(repr=False)
    template: str = "{object}, {style} style"
    phrases: Mapping[str, str] = field(default_factory=dict, repr=False)
    seeds: tuple[int, ...] = (188, 288, 588, 688, 888)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of `generate`."""

    def __post_init__(self) -> None:
        """Check that the crossing can be drawn."""
        if min(len(self.objects), len(self.styles)) < 2 or not self.seeds:
            raise PromptError(
                "`objects` and `styles` need at least two names and `seeds` at least one, got "
                f"{self.objects}, {self.styles} and {self.seeds}"
            )
        if "{object}" not in self.template or "{style}" not in self.template:
            raise PromptError(
                f'`template` must have "{{object}}" and "{{style}}", got {self.template!r}'
            )

    def domain(self, kind: Kind) -> tuple[str, ...]:
        """The names among which a target of `kind` is."""
        return self.objects if kind == "object" else self.styles

    def prompts(self) -> list[str]:
        """All objects in all styles, style by style within an object."""
        return [
            self.template.format(object=self.phrases.get(name, name), style=style)
            for name in self.objects
            for style in self.styles
        ]

    def recognised(self, pipe: Pipeline) -> dict[Kind, Tensor]:
        """Draw the canvas and judge it: whether the object, and the style, of each prompt is seen.

        Both are bool (objects, styles, seeds).
        """
        pairs = [(prompt, seed) for prompt in self.prompts() for seed in self.seeds]
        images = generate(
            pipe,
            [prompt for prompt, _ in pairs],
            seeds=[seed for _, seed in pairs],
            **self.settings,
        )
        crossed = images.unflatten(0, (len(self.objects), len(self.styles), len(self.seeds)))
        seen: dict[Kind, Tensor] = {}
        for kind, axis in AXES.items():
            by_name = [
                self.judges[kind](part.flatten(0, 1), name).reshape(part.shape[:2])
                for name, part in zip(self.domain(kind), crossed.unbind(axis), strict=True)
            ]
            seen[kind] = torch.stack(by_name, axis)
        return seen


@dataclass(frozen=True)
class CanvasScores:
    """Shares of images, 0 to 1, after erasing one target; larger is better."""

    ua: float
    """Unlearning accuracy: 1 - how often the target is seen in images of its prompts."""
    ira: float
    """In-domain retain accuracy: how often the other names of its domain are seen."""
    cra: float
    """Cross-domain retain accuracy: how often the other domain is seen, without its prompts."""

    @property
    def harmonic_mean(self) -> float:
        """The harmonic mean of the three, 0 when one of them is."""
        return harmonic_mean((self.ua, self.ira, self.cra))


def canvas_scores(seen: Mapping[Kind, Tensor], target: int, kind: Kind) -> CanvasScores:
    """Score what is seen, as `Canvas.recognised` returns it, for the target with that number.

    Each name counts alike. Prompts of the target count for UA alone: what else they show is free.
    """
    own, other = seen[kind], seen["style" if kind == "object" else "object"]
    axis = AXES[kind]
    own, other = own.movedim(axis, 0).float(), other.movedim(axis, 0).float()
    kept = torch.arange(len(own)) != target
    return CanvasScores(
        ua=1 - own[target].mean().item(),
        ira=own[kept].mean().item(),
        cra=other[kept].mean().item(),
    )


def harmonic_mean(shares: Sequence[float]) -> float:
    """Return the harmonic mean of shares in [0, 1], as MACE's H_o is (arXiv 2403.06135).

    >>> round(harmonic_mean((1.0, 0.5, 0.5)), 3), harmonic_mean((1.0, 0.0))
    (0.6, 0.0)
    """
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise UnweaveError(f"`shares` must be numbers in [0, 1], at least one, got {list(shares)}")
    return 0.0 if min(shares) == 0 else len(shares) / sum(1 / share for share in shares)


@dataclass(frozen=True)
class Row:
    """One target erased by one method; `stored_bytes` is the size of the saved erasure."""

    method: str
    target: str
    kind: Kind
    scores: CanvasScores
    seconds: float
    stored_bytes: int


@dataclass(frozen=True)
class Leaderboard:
    """All rows, and the scores of the model as it was, by target."""

    rows: tuple[Row, ...]
    before: Mapping[str, CanvasScores]
    canvas: Mapping[str, Any]

    def methods(self) -> list[str]:
        """The methods, the best mean harmonic mean first."""
        names = dict.fromkeys(row.method for row in self.rows)
        return sorted(names, key=lambda name: -self.mean(name, "harmonic_mean")[0])

    def mean(self, method: str, score: str) -> tuple[float, tuple[float, float] | None]:
        """Return the mean of a score over targets, with its bootstrap interval from 3 targets on.

        `score` is one of `SCORES`, "seconds" or "stored_bytes".
        """
        rows = [row for row in self.rows if row.method == method]
        values = [float(getattr(row.scores if score in SCORES else row, score)) for row in rows]
        if not values:
            raise UnweaveError(f"no row of {method!r}; there are {', '.join(self.methods())}")
        interval = bootstrap_interval(torch.tensor(values)) if len(values) > 2 else None
        return mean(values), interval

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "canvas": dict(self.canvas),
            "before": {name: asdict(scores) for name, scores in self.before.items()},
            "rows": [asdict(row) for row in self.rows],
            "means": {
                method: {
                    score: self.mean(method, score)[0]
                    for score in (*SCORES, "seconds", "stored_bytes")
                }
                for method in self.methods()
            },
        }

    def to_markdown(self) -> str:
        """Return a table of means, the best method first."""
        lines = [
            "| method | UA | IRA | CRA | harmonic mean | seconds | kB |",
            "|---|---|---|---|---|---|---|",
        ]
        for method in self.methods():
            cells = [_percent(*self.mean(method, score)) for score in SCORES]
            seconds, size = (self.mean(method, name)[0] for name in ("seconds", "stored_bytes"))
            cells += [f"{seconds:.1f}", f"{size / 1000:.0f}"]
            lines.append(f"| `{method}` | {' | '.join(cells)} |")
        return "\n".join(lines)

    def figure(self, path: str | Path) -> None:
        """Draw what is kept against what is gone, a point a method.

        Raises `UnweaveError` without matplotlib, which the extra `plots` brings.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UnweaveError(
                'a figure needs matplotlib: pip install "unweave-erasure[plots]"'
            ) from error
        figure = Figure(figsize=(6, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for method in self.methods():
            gone = 100 * self.mean(method, "ua")[0]
            kept = 50 * (self.mean(method, "ira")[0] + self.mean(method, "cra")[0])
            axes.scatter(gone, kept, s=40)
            axes.annotate(method, (gone, kept), xytext=(5, 4), textcoords="offset points")
        axes.set(xlabel="target gone: UA, %", ylabel="rest kept: mean of IRA and CRA, %")
        axes.grid(alpha=0.3)
        axes.margins(0.15)
        figure.savefig(path, dpi=150)


def rank_erasers(
    pipe: Pipeline,
    erasers: Mapping[str, Mapping[Kind, Eraser]],
    targets: Sequence[tuple[str, Kind]],
    canvas: Canvas,
    *,
    seed: int = 0,
    progress: bool = True,
) -> Leaderboard:
    """Erase each target by each eraser, for its kind, and draw the canvas after every erasure.

    All other names of the target's domain are given as `preserve`. `pipe` is left as it was.
    Raises `PromptError` for targets that are not on the canvas.
    """
    for target, kind in targets:
        if target not in canvas.domain(kind):
            raise PromptError(
                f"{target!r} is no {kind} of the canvas, which has {', '.join(canvas.domain(kind))}"
            )
    plain = canvas.recognised(pipe)
    before = {
        target: canvas_scores(plain, canvas.domain(kind).index(target), kind)
        for target, kind in targets
    }
    jobs = [(method, *target) for method in erasers for target in targets]
    rows = tuple(
        _row(pipe, erasers[method][kind], method, target, kind, canvas, seed)
        for method, target, kind in _tracked(jobs, progress)
    )
    described = {
        "template": canvas.template,
        "objects": len(canvas.objects),
        "styles": len(canvas.styles),
        "seeds": list(canvas.seeds),
    }
    return Leaderboard(rows, before, described)


def save_leaderboard(board: Leaderboard, folder: str | Path) -> None:
    """Write `leaderboard.json`, `leaderboard.md` and `leaderboard.png` into `folder`."""
    from unweave.diffusion_core.files import atomic_write_bytes

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(board.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_bytes(folder / "leaderboard.json", text.encode())
    atomic_write_bytes(folder / "leaderboard.md", board.to_markdown().encode())
    board.figure(folder / "leaderboard.png")


def _row(
    pipe: Pipeline,
    eraser: Eraser,
    method: str,
    target: str,
    kind: Kind,
    canvas: Canvas,
    seed: int,
) -> Row:
    domain = canvas.domain(kind)
    others = tuple(name for name in domain if name != target)
    start = time.perf_counter()
    erasure = eraser.erase(
        pipe, ErasureRequest(target, preserve=others, kind=kind), seed=seed, progress=False
    )
    seconds = time.perf_counter() - start
    with erasure.apply(pipe):
        seen = canvas.recognised(pipe)
    return Row(
        method,
        target,
        kind,
        canvas_scores(seen, domain.index(target), kind),
        seconds,
        erasure.delta.num_bytes,
    )


def _tracked(
    jobs: Sequence[tuple[str, str, Kind]], progress: bool
) -> Iterator[tuple[str, str, Kind]]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(
        jobs, "erasing", console=console, disable=not (progress and console.is_terminal)
    )


def _percent(value: float, interval: tuple[float, float] | None) -> str:
    shown = f"{100 * value:.0f} %"
    return (
        shown if interval is None else f"{shown} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}]"
    )
