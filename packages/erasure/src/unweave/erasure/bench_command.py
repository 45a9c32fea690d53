"""The command `unweave erase-bench`: rank erasers on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unweave.diffusion_core.errors import ArtifactError, PromptError, SelectionError
from unweave.erasure.console import print_table, quiet_libraries, say, stdout_for_results
from unweave.erasure.erase_run import EMOJI_WORLD, EVALUATION_SEED, load_judge

if TYPE_CHECKING:
    from unweave.erasure.leaderboard import Canvas, Kind, Leaderboard

TEST_OBJECTS = ("panda", "strawberry", "bicycle", "penguin")
"""Objects that no recipe was tuned on."""

TEST_STYLES = ("openmoji", "fluent")
"""Styles to erase unless others are asked for."""


def erase_bench(
    method: Annotated[
        list[str] | None,
        typer.Option(help="A name from `unweave methods`; by default those with a recipe."),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="An object to erase; once for each.")
    ] = None,
    style: Annotated[
        list[str] | None, typer.Option(help="A style to erase; once for each.")
    ] = None,
    objects: Annotated[
        int, typer.Option(min=2, help="How many objects to draw, targets included.")
    ] = 40,
    seeds: Annotated[int, typer.Option(min=1, help="Images for each object in each style.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the erasing.")] = 0,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/leaderboard"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")
    ] = False,
) -> None:
    """Erase several concepts by several methods and rank what is gone, kept and spent.

    Every erased model draws all objects in all styles: UA is how often the target is gone, IRA how
    often the rest of its kind stays, CRA how often the other kind stays. The output folder gets
    leaderboard.json, leaderboard.md and leaderboard.png.
    """
    from unweave.diffusion_core.pipelines import load_pipeline
    from unweave.erasure.leaderboard import rank_erasers, save_leaderboard
    from unweave.erasure.methods import METHODS, NEED_REPLACEMENT, make_eraser
    from unweave.erasure.recipes import RECIPES

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(f"--out {str(out)!r} exists already; give a new or an empty folder")
    names = method or list(RECIPES[EMOJI_WORLD])
    for name in names:
        if name in NEED_REPLACEMENT:
            raise SelectionError(
                f"{name!r} needs a replacement for each target, which this command does not choose;"
                " rank it with rank_erasers in Python, or leave it out"
            )
        if name not in METHODS:
            raise SelectionError(f"--method must be one of {tuple(METHODS)}, got {name!r}")
    objects_to_erase = TEST_OBJECTS if target is None else tuple(target)
    styles_to_erase = TEST_STYLES if style is None else tuple(style)
    kinds: tuple[Kind, ...] = ("object", "style")
    with stdout_for_results() as show:
        quiet_libraries()
        canvas = embedded_canvas(objects_to_erase, objects, seeds, seed)
        erasers = {
            name: {kind: make_eraser(name, EMOJI_WORLD, kind) for kind in kinds} for name in names
        }
        targets: list[tuple[str, Kind]] = [
            *((name, "object") for name in objects_to_erase),
            *((name, "style") for name in styles_to_erase),
        ]
        images = len(names) * len(targets) * len(canvas.prompts()) * seeds
        say(f"{len(names)} methods x {len(targets)} targets: {images} images to draw")
        board = rank_erasers(load_pipeline(EMOJI_WORLD), erasers, targets, canvas, seed=seed)
        save_leaderboard(board, out)
        if as_json:
            show(json.dumps(board.to_dict()))
    if not as_json:
        _print(board, out)


def embedded_canvas(targets: tuple[str, ...], objects: int, seeds: int, seed: int) -> Canvas:
    """Return the canvas of emoji-world: `targets` first, other objects up to `objects`, all styles.

    Raises `PromptError` for objects that it was not trained on.
    """
    from unweave.diffusion_core.embedded import embedded_world
    from unweave.erasure.leaderboard import Canvas

    world = embedded_world()
    for name in targets:
        if name not in world.trained:
            raise PromptError(f"emoji-world knows no {name!r}; it knows {', '.join(world.trained)}")
    names = tuple(dict.fromkeys((*targets, *world.trained)))[: max(objects, len(targets))]
    first = EVALUATION_SEED + seed
    return Canvas(
        names,
        tuple(world.styles),
        {"object": load_judge("object"), "style": load_judge("style")},
        phrases={name: world.phrase(name) for name in names},
        seeds=tuple(range(first, first + seeds)),
    )


def _print(board: Leaderboard, out: Path) -> None:
    headers, _, *rows = (line.strip("| ").split(" | ") for line in board.to_markdown().splitlines())
    print_table(headers, [[cell.strip("`") for cell in row] for row in rows])
    typer.echo(f"files: {out}")
