"""The commands that this package adds to `unweave`: attend maps, attend compose, attend anagram."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unweave.attention_tools.errors import AttentionError

if TYPE_CHECKING:
    from unweave.attention_tools.maps import AttentionMaps
    from unweave.attention_tools.report import Table
    from unweave.attention_tools.tokens import Word

EMOJI_WORLD = "emoji-world"
GUIDANCE = {EMOJI_WORLD: 4.0}
USUAL_GUIDANCE = 7.5
RECIPES: dict[str, dict[str, Any]] = {
    "a-star": {"preprocess": "raw", "resolution": 16, "alpha": 5.0},
    "attend-and-excite": {
        "preprocess": "raw",
        "resolution": 16,
        "max_iter_to_alter": 12,
        "thresholds": {},
    },
}
"""Settings for the embedded model, whose maps are small; no start token takes most attention."""

attend = typer.Typer(
    help="See where words look, compose several subjects, make visual anagrams.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Method(StrEnum):
    """How `compose` keeps subjects apart."""

    a_star = "a-star"
    attend_and_excite = "attend-and-excite"
    t2i_zero = "t2i-zero"


ModelOption = Annotated[str, typer.Option(help='"emoji-world", a diffusers folder or a hub id.')]
OutOption = Annotated[Path, typer.Option(help="The folder to write to.")]
SeedOption = Annotated[int, typer.Option(help="The seed of the noise.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; by default the model's own.")
]
WordsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--word",
        help="A word or phrase of the prompt; may be repeated. Without any, the subjects of the "
        "prompt are found by a rule.",
    ),
]
ResolutionOption = Annotated[
    int | None, typer.Option(min=1, help="Positions a side of the maps that are read.")
]


@attend.command()
def maps(
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    words: WordsOption = None,
    model: ModelOption = EMOJI_WORLD,
    out: OutOption = Path("runs/maps"),
    seed: SeedOption = 0,
    steps: StepsOption = 25,
    guidance_scale: GuidanceOption = None,
    resolution: ResolutionOption = None,
    animate: Annotated[bool, typer.Option(help="Also write the maps step by step.")] = False,
) -> None:
    """Generate an image and show where it looked for each word.

    Writes image.png, maps.png with the map of each word, layers.png with those of each layer,
    maps.npz with the numbers, with --animate steps.gif, and report.html with all of it.
    """
    from unweave.attention_tools.capture import capture_attention
    from unweave.attention_tools.tokens import find_tokens

    with redirect_stdout(sys.stderr):
        pipe = _load(model)
        tokens = find_tokens(pipe, prompt, words or _subjects(prompt, model))
        with capture_attention(
            pipe, tokens=tokens, resolution=resolution, each_step=animate
        ) as seen:
            image = _generate(pipe, model, prompt, seed, steps, guidance_scale)
        out.mkdir(parents=True, exist_ok=True)
        image.save(out / "image.png")
        seen.grid(image).save(out / "maps.png")
        seen.grid(image, by="layer").save(out / "layers.png")
        if animate:
            seen.animate(out / "steps.gif", image)
        seen.save(out / "maps.npz")
    pictures = {
        "The image.": "image.png",
        "Where each word looks, averaged over layers and steps.": "maps.png",
        "The same by layer.": "layers.png",
        **({"The same step by step.": "steps.gif"} if animate else {}),
    }
    about = {"prompt": prompt, "words": list(tokens.words), "seed": seed, "steps": steps}
    _finish(out, "Where words look", about, pictures, _map_tables(seen), ["maps.npz"])


@attend.command()
def compose(
    prompt: Annotated[str, typer.Argument(help="A prompt with several subjects.")],
    words: WordsOption = None,
    method: Annotated[Method, typer.Option(help="How subjects are kept apart.")] = Method.a_star,
    model: ModelOption = EMOJI_WORLD,
    out: OutOption = Path("runs/compose"),
    seed: SeedOption = 0,
    samples: Annotated[int, typer.Option(min=1, max=16, help="Seeds, from `--seed` on.")] = 4,
    steps: StepsOption = 25,
    guidance_scale: GuidanceOption = None,
    resolution: ResolutionOption = None,
) -> None:
    """Generate a prompt of several subjects with and without a method that keeps them apart.

    Writes grid.png, with the plain pipeline above, the method below and a column a seed, and
    report.html.
    """
    from unweave.attention_tools.tokens import find_tokens

    with redirect_stdout(sys.stderr):
        pipe = _load(model)
        concepts = words or _subjects(prompt, model)
        run = _composer(pipe, method, model, resolution)
        rows: list[list[Any]] = [[], []]
        for own in range(seed, seed + samples):
            rows[0].append(_generate(pipe, model, prompt, own, steps, guidance_scale))
            options = _options(model, own, steps, guidance_scale)
            rows[1].append(run(prompt, concepts, **options).images[0])
        out.mkdir(parents=True, exist_ok=True)
        _sheet(rows).save(out / "grid.png")
    about = {
        "prompt": prompt,
        "words": list(find_tokens(pipe, prompt, concepts).words),
        "method": str(method),
        "seed": seed,
        "steps": steps,
    }
    caption = f"Above the plain pipeline, below {method}; a column a seed, from {seed} on."
    _finish(out, "Subjects kept apart", about, {caption: "grid.png"})


@attend.command()
def anagram(
    prompts: Annotated[list[str], typer.Argument(help="One prompt a view.")],
    views: Annotated[
        list[str], typer.Option("--view", help="One view a prompt, as identity, flip, rotate_cw.")
    ],
    model: ModelOption = EMOJI_WORLD,
    out: OutOption = Path("runs/anagram"),
    seed: SeedOption = 0,
    steps: StepsOption = 30,
    guidance_scale: Annotated[float, typer.Option(min=0, help="Guidance scale.")] = 10.0,
) -> None:
    """Make one image that reads as each prompt under its view.

    Balancing needs a noise-aware scorer and is left out. Writes image.png, views.png with all views
    side by side, and the record of each step in result.json.
    """
    from unweave.attention_tools.anagram import AnagramConfig, AnagramMTL

    with redirect_stdout(sys.stderr):
        pipe = _load(model)
        maker = AnagramMTL(pipe, AnagramConfig(balancing=False))
        made = maker(
            prompts,
            views,
            generator=_generator(seed),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
        out.mkdir(parents=True, exist_ok=True)
        made.image.save(out / "image.png")
        made.strip().save(out / "views.png")
    about = {"prompts": prompts, "views": views, "seed": seed}
    pictures = {"The image.": "image.png", "The image in each view.": "views.png"}
    _finish(out, "Anagram", about, pictures, result=made.record)


def _load(model: str) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipe: Any
    if model == EMOJI_WORLD:
        pipe = _embedded()
    else:
        try:
            pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise AttentionError(f"no pipeline can be loaded from {model!r}: {error}") from error
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


def _embedded() -> Any:
    try:
        from unweave.emoji_world import load_pipeline
    except ImportError as error:
        raise AttentionError(
            'the model "emoji-world" needs: pip install "unweave-attention-tools[emoji-world]"'
        ) from error
    return load_pipeline()


def _composer(pipe: Any, method: Method, model: str, resolution: int | None) -> Any:
    from unweave.attention_tools.a_star import AStar, AStarConfig
    from unweave.attention_tools.attend_and_excite import AttendAndExcite, AttendAndExciteConfig
    from unweave.attention_tools.t2i_zero import T2IZero

    recipe = dict(RECIPES.get(method, {})) if model == EMOJI_WORLD else {}
    if resolution is not None:
        recipe["resolution"] = resolution
    if method is Method.a_star:
        return AStar(pipe, AStarConfig(**recipe))
    if method is Method.attend_and_excite:
        return AttendAndExcite(pipe, AttendAndExciteConfig(**recipe))
    return T2IZero(pipe)


def _generate(
    pipe: Any, model: str, prompt: str, seed: int, steps: int, guidance_scale: float | None
) -> Any:
    return pipe(prompt, **_options(model, seed, steps, guidance_scale)).images[0]


def _options(model: str, seed: int, steps: int, guidance_scale: float | None) -> dict[str, Any]:
    own = GUIDANCE.get(model, USUAL_GUIDANCE)
    return {
        "generator": _generator(seed),
        "num_inference_steps": steps,
        "guidance_scale": own if guidance_scale is None else guidance_scale,
    }


def _generator(seed: int) -> Any:
    import torch

    return torch.Generator().manual_seed(seed)


def _sheet(rows: list[list[Any]]) -> Any:
    """Return rows of images as one picture."""
    from PIL import Image

    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (width + 4), len(rows) * (height + 4)), "white")
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            sheet.paste(image, (column * (width + 4), row * (height + 4)))
    return sheet


def _subjects(prompt: str, model: str) -> tuple[Word, ...]:
    """Return the subjects of a prompt, of which the embedded model knows the names."""
    from unweave.attention_tools.subjects import find_subjects

    if model != EMOJI_WORLD:
        return find_subjects(prompt)
    from unweave.emoji_world import World

    return find_subjects(prompt, World.concepts)


def _map_tables(seen: AttentionMaps) -> list[Table]:
    """Return what the maps of words come to, and how far those of two words overlap."""
    from itertools import combinations

    from unweave.attention_tools.overlap import min_sum_ratio
    from unweave.attention_tools.report import Table

    maps, names = seen.aggregate()[0], list(seen.names or ())
    covered = seen.to_mask()[0].float().mean((1, 2))
    rows = [
        (name, float(own.max()), float(own.mean()), f"{100 * float(share):.0f} %")
        for name, own, share in zip(names, maps, covered, strict=True)
    ]
    tables = [Table("Words", ("word", "largest", "mean", "inside Otsu's threshold"), rows)]
    pairs = [
        (f"{names[first]} and {names[second]}", float(min_sum_ratio(maps[first], maps[second])))
        for first, second in combinations(range(len(names)), 2)
    ]
    if pairs:
        tables.append(
            Table("Overlap", ("words", "sum of minima over sum, 0 apart to 0.5 equal"), pairs)
        )
    return tables


def _finish(
    out: Path,
    title: str,
    about: Mapping[str, Any],
    pictures: Mapping[str, str],
    tables: Sequence[Table] = (),
    others: Sequence[str] = (),
    result: Mapping[str, Any] | None = None,
) -> None:
    """Write the report and the result as JSON, and print the paths of all files.

    `pictures` are names of files by what they show, `others` names of files that are none.
    """
    from unweave.attention_tools.report import write_report

    shown = {caption: out / name for caption, name in pictures.items()}
    write_report(out / "report.html", title, about=about, pictures=shown, tables=tables)
    names = [*pictures.values(), *others, "report.html"]
    told = {**(result or {}), **about, "files": {name: str(out / name) for name in names}}
    (out / "result.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    for path in (*told["files"].values(), str(out / "result.json")):
        typer.echo(path)
