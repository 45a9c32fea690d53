"""The commands that this package adds to `unweave`: erase, generate, methods, models."""

from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from unweave.diffusion_core.embedded import embedded_recogniser, embedded_world
from unweave.diffusion_core.errors import (
    ArtifactError,
    ImageError,
    PromptError,
    SelectionError,
    UnweaveError,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from unweave.diffusion_core.weight_delta import WeightDelta
    from unweave.erasure.evaluation import Judge
    from unweave.erasure.protocol import Eraser, Erasure, ErasureRequest

OUTPUT_KIND = "unweave erase"
"""What `manifest.json` in the output folder of `unweave erase` calls it."""

WEIGHTS_FOLDER = "weights"
"""The erasure inside that folder, for `Erasure.load`."""

EVALUATION_SEED = 1000
"""First evaluation seed less `--seed`: images to learn from and to judge by share no noise."""

STYLE_TEMPLATES = (
    "a cat face, {} style",
    "a rocket, {} style",
    "a pizza, {} style",
    "a tree, {} style",
)
"""Prompts by which a style of emoji-world is judged."""

_EMOJI_WORLD = "emoji-world"
_GUIDANCE = {_EMOJI_WORLD: 4.0}
_USUAL_GUIDANCE = 7.5
_NO_JUDGE = (
    "no rates were measured: no judge knows this model's concepts; compare the images in the report"
)
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
    model: ModelOption = _EMOJI_WORLD,
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
    with _stdout_for_results() as show:
        if dry_run:
            plan.check()
            result = plan.to_dict()
            show(json.dumps(result) if as_json else _described(result))
            return
        result = plan.run()
        show(json.dumps(result) if as_json else _table_of_rates(result))


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: ModelOption = _EMOJI_WORLD,
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
    with _stdout_for_results() as show:
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
    _print_table(("method", "what it does", "settings (table `settings` in --config)"), rows)


def models(as_json: JsonOption = False) -> None:
    """List the models that have a name; diffusers folders and hub ids work as well."""
    from unweave.diffusion_core.pipelines import MODELS

    if as_json:
        typer.echo(json.dumps(MODELS))
        return
    _print_table(("model", "what it is"), list(MODELS.items()))


@dataclass(frozen=True)
class ErasePlan:
    """Everything `unweave erase` was asked for."""

    target: str
    model: str
    method: str
    preserve: tuple[str, ...]
    replacement: str | None
    images: Path | None
    kind: Literal["object", "style"]
    judge: str | None
    seed: int
    seeds: int
    steps: int
    guidance: float
    out: Path
    settings: Mapping[str, Any]

    @property
    def evaluation_seeds(self) -> range:
        """The seeds of the images that are judged."""
        first = self.seed + EVALUATION_SEED
        return range(first, first + self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        plain = {key: str(v) if isinstance(v, Path) else v for key, v in vars(self).items()}
        return {**plain, "preserve": list(self.preserve), "settings": dict(self.settings)}

    def check(self) -> CheckedPlan:
        """Check all input, cheapest first, and load the model; nothing is written."""
        from unweave.diffusion_core import pipelines
        from unweave.diffusion_core.latents import load_images
        from unweave.erasure.methods import make_eraser
        from unweave.erasure.protocol import ErasureRequest

        paths = None if self.images is None else _image_files(self.images)
        request = ErasureRequest(
            self.target, self.replacement, self.preserve, images=paths, kind=self.kind
        )
        try:
            eraser = make_eraser(self.method, self.model, **self.settings)
        except TypeError as error:
            raise SelectionError(
                f"[settings] has a value of the wrong type: {error}; `unweave methods` shows the "
                f"settings of {self.method!r}, got {dict(self.settings)!r}"
            ) from error
        self._check_concepts()
        _check_output(self.out)
        if paths is not None:
            self._check_images_are_used()
            load_images(paths, 64)
        judge = self._load_judge()
        return CheckedPlan(self, request, eraser, judge, pipelines.load_pipeline(self.model))

    def run(self) -> dict[str, Any]:
        """Erase, evaluate and write the output folder; return what `--json` prints."""
        from unweave.diffusion_core.files import folder_lock

        checked = self.check()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.out):
            _check_output(self.out)
            return checked.run()

    def _check_concepts(self) -> None:
        if self.model != _EMOJI_WORLD:
            return
        if self.kind == "style":
            for style in (self.target, *self.preserve):
                _require_known(style, embedded_world().styles, {}, "style")
            return
        synonyms = {
            word: entry.name for entry in embedded_world().table.values() for word in entry.synonyms
        }
        for concept in (self.target, *self.preserve):
            _require_known(concept, embedded_world().trained, synonyms, "concept")

    def _check_images_are_used(self) -> None:
        from unweave.erasure.methods import METHODS

        if "num_images" not in {field.name for field in fields(METHODS[self.method].config_class)}:
            raise SelectionError(
                f"--images has no effect on {self.method!r}, which learns from the name alone; "
                "leave it out or take --method few-shot"
            )

    def _load_judge(self) -> Judge | None:
        if self.judge == "none":
            return None
        if self.judge not in (None, "recogniser"):
            raise SelectionError(f'--judge must be "recogniser" or "none", got {self.judge!r}')
        if self.model != _EMOJI_WORLD:
            raise SelectionError(
                f"no judge knows the concepts of the model {self.model!r}; give --judge none for a "
                "report with images and without rates, or use evaluate_erasure with your own judge"
            )
        return load_judge(self.kind)


@dataclass(frozen=True)
class CheckedPlan:
    """A plan with what it needs, loaded."""

    plan: ErasePlan
    request: ErasureRequest
    eraser: Eraser
    judge: Judge | None
    pipe: StableDiffusionPipeline

    def run(self) -> dict[str, Any]:
        """Erase, evaluate and write the output folder; return what `--json` prints."""
        from unweave.diffusion_core.files import atomic_folder, write_manifest

        plan = self.plan
        _say(f"erasing {plan.target!r} from {plan.model} by {plan.method}")
        start = time.perf_counter()
        erasure = self.eraser.erase(self.pipe, self.request, seed=plan.seed, progress=True)
        seconds = time.perf_counter() - start
        _say(f"erased in {seconds:.1f} s; drawing {plan.seeds} images for each prompt")
        with atomic_folder(plan.out) as folder:
            erasure.save(folder / WEIGHTS_FOLDER)
            rates = self._report(erasure, folder)
            write_manifest(folder, {"kind": OUTPUT_KIND, "plan": plan.to_dict()})
        return {
            "method": plan.method,
            "target": plan.target,
            "seconds": round(seconds, 3),
            **rates,
            "files": {
                "report": str(plan.out / "report.html"),
                "grid": str(plan.out / "grid.png"),
                "weights": str(plan.out / WEIGHTS_FOLDER),
            },
        }

    def _report(self, erasure: Erasure, folder: Path) -> dict[str, Any]:
        """Write the report into `folder` and return the rates."""
        if self.judge is None:
            _say(_NO_JUDGE)
            self._report_images(erasure, folder)
            unknown: dict[str, float | None] = {"before": None, "after": None}
            preserved = {name: dict(unknown) for name in self.plan.preserve}
            return {"target_rate": unknown, "preserved": preserved}
        from unweave.erasure.evaluation import evaluate_erasure

        plan = self.plan
        evaluation = evaluate_erasure(
            self.pipe,
            erasure,
            self.judge,
            target=plan.target,
            preserve=plan.preserve,
            templates=self._templates(),
            seeds=plan.evaluation_seeds,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
        )
        evaluation.to_report(folder)
        rates = {
            name: {"before": rate.before.value, "after": rate.after.value}
            for name, rate in {plan.target: evaluation.target_rate, **evaluation.preserved}.items()
        }
        return {"target_rate": rates.pop(plan.target), "preserved": rates}

    def _report_images(self, erasure: Erasure, folder: Path) -> None:
        """Write a report with the same images before and after, and no rates."""
        from unweave.diffusion_core.report import Report

        plan = self.plan
        report = Report(f"Erasing {plan.target!r}").add_text(_NO_JUDGE.capitalize() + ".")
        prompts = {
            concept: self._templates()[0].replace("{}", concept)
            for concept in (plan.target, *plan.preserve)
        }
        before = {concept: self._images(prompt) for concept, prompt in prompts.items()}
        with erasure.apply(self.pipe):
            after = {concept: self._images(prompt) for concept, prompt in prompts.items()}
        for concept, prompt in prompts.items():
            labels = [f"{prompt} (seed {seed})" for seed in plan.evaluation_seeds]
            report.add_images(f"{concept}: before", before[concept], labels)
            report.add_images(f"{concept}: after", after[concept], labels)
        report.save(folder)

    def _images(self, prompt: str) -> Tensor:
        from unweave.diffusion_core import pipelines

        plan = self.plan
        return pipelines.generate(
            self.pipe,
            [prompt] * plan.seeds,
            seeds=plan.evaluation_seeds,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance,
        )

    def _templates(self) -> tuple[str, ...]:
        if self.plan.kind == "object":
            return ("a {}",)
        return STYLE_TEMPLATES if self.plan.model == _EMOJI_WORLD else ("a picture, {} style",)


def load_judge(kind: str) -> Judge:
    """Return emoji-world's recogniser as a judge of objects or of styles."""
    from unweave.erasure.evaluation import recogniser_judge

    recogniser = embedded_recogniser()
    if kind == "object":
        return recogniser_judge(recogniser)
    styles = embedded_world().styles

    def judge(images: Tensor, style: str) -> Tensor:
        found: Tensor = recogniser.styles(images) == styles.index(style)
        return found

    return judge


def _require_known(name: str, known: Sequence[str], synonyms: Mapping[str, str], what: str) -> None:
    if name in known:
        return
    words = {word.casefold(): word for word in known}
    words |= {word.casefold(): concept for word, concept in synonyms.items() if concept in known}
    near = get_close_matches(name.strip().casefold(), words, n=3, cutoff=0.5)
    found = list(dict.fromkeys(words[word] for word in near))
    hint = (
        f"did you mean {' or '.join(map(repr, found))}?"
        if found
        else f"it knows {', '.join(known)}"
    )
    raise PromptError(f"the model 'emoji-world' knows no {what} {name!r}; {hint}")


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise ImageError(f"--images {str(folder)!r} {problem}; give a folder of images")
    files = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    if not files:
        raise ImageError(f"--images {str(folder)!r} holds no files; put about four images into it")
    return files


def _check_output(out: Path) -> None:
    """Raise `ArtifactError` unless `out` is new, empty, or all of it an earlier output."""
    from unweave.diffusion_core.files import MANIFEST, read_manifest

    if not out.exists():
        return
    if not out.is_dir():
        raise ArtifactError(f"--out {str(out)!r} is a file; give a new folder")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    manifest = read_manifest(out) if MANIFEST in names else {}
    if manifest.get("kind") != OUTPUT_KIND:
        raise ArtifactError(
            f"--out {str(out)!r} holds files and is no output of `unweave erase`; give a new folder"
        )
    foreign = sorted(names - {MANIFEST, *(name.split("/")[0] for name in manifest["files"])})
    if foreign:
        raise ArtifactError(
            f"--out {str(out)!r} would be replaced, but holds {foreign[0]!r}, which is not from "
            "`unweave erase`; move that away or give a new folder"
        )


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


@contextmanager
def _stdout_for_results() -> Iterator[Callable[[str], None]]:
    """Send what libraries print to stderr; what is yielded prints a result on stdout."""
    stdout = sys.stdout

    def show(text: str) -> None:
        print(text, file=stdout, flush=True)

    with redirect_stdout(sys.stderr):
        yield show


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _described(plan: Mapping[str, Any]) -> str:
    shown = [f"{key}: {value}" for key, value in plan.items() if value not in (None, [], {})]
    return "\n".join([*shown, "nothing was written (--dry-run)"])


def _table_of_rates(result: Mapping[str, Any]) -> str:
    rows = [
        ("target", result["target"], result["target_rate"]),
        *(("preserved", name, rate) for name, rate in result["preserved"].items()),
    ]
    table = _rendered_table(
        ("", "concept", "seen before", "seen after"),
        [
            (role, name, _percent(rate["before"]), _percent(rate["after"]))
            for role, name, rate in rows
        ],
    )
    files = [f"{name}: {path}" for name, path in result["files"].items()]
    return "\n".join([table, f"erased in {result['seconds']:.1f} s", *files])


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.0f} %"


def _print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    typer.echo(_rendered_table(headers, rows))


def _rendered_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(Text(header)) for header in headers), box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
