"""The commands that this package adds to `unweave`: erase, generate, methods, models."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unweave.diffusion_core.errors import ArtifactError, PromptError, UnweaveError
from unweave.erasure.console import (
    described,
    print_table,
    quiet_libraries,
    stdout_for_results,
    table_of_rates,
)
from unweave.erasure.erase_run import EMOJI_WORLD, WEIGHTS_FOLDER, ErasePlan

if TYPE_CHECKING:
    from torch import Tensor

    from unweave.diffusion_core.weight_delta import WeightDelta

_GUIDANCE = {EMOJI_WORLD: 4.0}
_USUAL_GUIDANCE = 7.5
_LONGEST_SLUG = 60

ModelOption = Annotated[
    str, typer.Option(help="A name from `unweave models`, a diffusers folder or a hub id.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, all else on stderr.")
]
StepsOption = Annotated[int, typer.Option(min=1, help="Denoising steps of each image.")]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale; by default the model's own.")
]


def _read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command's options."""
    if path is None or ctx.resilient_parsing:
        return path
    config = _parse_toml(path)
    settings = config.pop("settings", {})
    if not isinstance(settings, dict):
        raise UnweaveError(f"`settings` in {str(path)!r} must be a table, got {settings!r}")
    known = [p.name for p in ctx.command.params if p.name and p.name not in ("config", "help")]
    defaults: dict[str, Any] = {}
    for key, value in config.items():
        name = key.replace("-", "_")
        name = "as_json" if name == "json" else name
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise UnweaveError(
                f"{str(path)!r} sets {key!r}, which is no option of this command; {hint} "
                "Settings of the method go into a [settings] table."
            )
        single = name == "preserve" and isinstance(value, str)
        defaults[name] = [value] if single else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    ctx.obj = settings
    return path


def erase(
    ctx: typer.Context,
    target: Annotated[str, typer.Argument(help="The concept to erase, as prompts name it.")],
    model: ModelOption = EMOJI_WORLD,
    method: Annotated[str, typer.Option(help="A name from `unweave methods`.")] = "few-shot",
    preserve: Annotated[
        list[str] | None, typer.Option(help="A concept to keep; give it once for each.")
    ] = None,
    replacement: Annotated[
        str | None, typer.Option(help="The concept to put in its place, for uce and esd.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of about four images of the target.")
    ] = None,
    kind: Annotated[
        Literal["object", "style"], typer.Option(help="What the target is.")
    ] = "object",
    judge: Annotated[
        str | None,
        typer.Option(help="Who says what images show: recogniser (emoji-world only) or none."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the erasing.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Images to judge for each prompt.")] = 8,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder, by default runs/<target>.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_read_config,
            is_eager=True,
            help="A TOML file: values for these options, and a table `settings` for the method.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the input and the model; write nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Erase a concept from a model, and show with pictures and numbers what that did.

    The output folder gets report.html, grid.png, numbers.json and weights/, which is the erasure:
    use it with `unweave generate --apply`, or in Python with Erasure.load. A folder from an
    earlier `unweave erase` is replaced, whole and only at the end; any other is left alone.
    """
    plan = ErasePlan(
        target=target,
        model=model,
        method=method,
        preserve=tuple(preserve or ()),
        replacement=replacement,
        images=images,
        kind=kind,
        judge=judge,
        seed=seed,
        seeds=seeds,
        steps=steps,
        guidance=_GUIDANCE.get(model, _USUAL_GUIDANCE) if guidance is None else guidance,
        out=Path("runs") / _slug(target) if out is None else out,
        settings=dict(ctx.obj or {}),
    )
    with stdout_for_results() as show:
        quiet_libraries()
        if dry_run:
            plan.check()
            result = plan.to_dict()
            show(json.dumps(result) if as_json else described(result))
            return
        result = plan.run()
        show(json.dumps(result) if as_json else table_of_rates(result))


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: ModelOption = EMOJI_WORLD,
    apply: Annotated[
        list[Path] | None,
        typer.Option(help="The output of `unweave erase`, or weights in it; once for each."),
    ] = None,
    strength: Annotated[float, typer.Option(help="How strongly it is applied; 1 is whole.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many images, of consecutive seeds.")] = 1,
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("runs/images"),
    as_json: JsonOption = False,
) -> None:
    """Draw images of a prompt, with or without erasures, and print their paths.

    Files are named by prompt and seed. Existing files are never overwritten.
    """
    if not prompt.strip():
        raise PromptError(f'PROMPT is empty: {prompt!r}; say what to draw, such as "a cat face"')
    seeds = list(range(seed, seed + count))
    paths = [out / f"{_slug(prompt)}-{number}.png" for number in seeds]
    for path in paths:
        if path.exists():
            raise ArtifactError(
                f"{str(path)!r} exists already; choose another --seed or --out, or remove it"
            )
    with stdout_for_results() as show:
        quiet_libraries()
        deltas = [_load_delta(folder) for folder in apply or ()]
        images = _draw(model, deltas, strength, prompt, seeds, steps, guidance)
        out.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            _write_png(path, image)
        files = [str(path) for path in paths]
        show(json.dumps({"prompt": prompt, "files": files}) if as_json else "\n".join(files))


def methods(as_json: JsonOption = False) -> None:
    """List the methods of erasing and their settings."""
    from unweave.erasure.methods import METHODS

    summaries = {name: (method.__doc__ or "").split("\n")[0] for name, method in METHODS.items()}
    settings = {
        name: {
            field.name: None if field.default is MISSING else field.default
            for field in fields(method.config_class)
        }
        for name, method in METHODS.items()
    }
    if as_json:
        found = {n: {"summary": summaries[n], "settings": settings[n]} for n in METHODS}
        typer.echo(json.dumps(found))
        return
    rows = [
        (name, summaries[name], ", ".join(f"{key}={value!r}" for key, value in defaults.items()))
        for name, defaults in settings.items()
    ]
    print_table(("method", "what it does", "settings (table `settings` in --config)"), rows)


def models(as_json: JsonOption = False) -> None:
    """List the models that have a name; diffusers folders and hub ids work as well."""
    from unweave.diffusion_core.pipelines import MODELS

    if as_json:
        typer.echo(json.dumps(MODELS))
        return
    print_table(("model", "what it is"), list(MODELS.items()))


def _load_delta(folder: Path) -> WeightDelta:
    from unweave.diffusion_core.weight_delta import WeightDelta

    if not folder.is_dir():
        raise ArtifactError(
            f"--apply {str(folder)!r} is no folder; give the --out of an earlier `unweave erase`"
        )
    inner = folder / WEIGHTS_FOLDER
    return WeightDelta.load(inner if inner.is_dir() else folder)


def _draw(
    model: str,
    deltas: Sequence[WeightDelta],
    strength: float,
    prompt: str,
    seeds: Sequence[int],
    steps: int,
    guidance: float | None,
) -> Tensor:
    from unweave.diffusion_core import pipelines

    pipe = pipelines.load_pipeline(model)
    for delta in deltas:
        delta.apply(pipe, strength)
    return pipelines.generate(
        pipe,
        [prompt] * len(seeds),
        seeds=seeds,
        num_inference_steps=steps,
        guidance_scale=_GUIDANCE.get(model, _USUAL_GUIDANCE) if guidance is None else guidance,
    )


def _write_png(path: Path, image: Tensor) -> None:
    import io

    import torch
    from PIL import Image

    from unweave.diffusion_core.files import atomic_write_bytes

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, format="PNG")
    atomic_write_bytes(path, buffer.getvalue())


def _parse_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnweaveError(f"cannot read --config {str(path)!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UnweaveError(f"--config {str(path)!r} is no TOML: {error}") from error


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.casefold()).strip("-")[:_LONGEST_SLUG] or "concept"
