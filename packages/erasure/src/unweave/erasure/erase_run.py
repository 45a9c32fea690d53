"""One run of `unweave erase`: check the input, erase, judge, and write the output folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unweave.diffusion_core.embedded import embedded_recogniser, embedded_world
from unweave.diffusion_core.errors import ArtifactError, ImageError, PromptError, SelectionError
from unweave.erasure.console import say

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from unweave.erasure.evaluation import Judge
    from unweave.erasure.protocol import Eraser, Erasure, ErasureRequest

EMOJI_WORLD = "emoji-world"
"""The model whose concepts the embedded recogniser judges."""

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
    "a guitar, {} style",
    "a penguin, {} style",
    "a sunflower, {} style",
)
"""Prompts by which a style of emoji-world is judged."""

_NO_JUDGE = (
    "no rates were measured: no judge knows this model's concepts; compare the images in the report"
)


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
            eraser = make_eraser(self.method, self.model, self.kind, **self.settings)
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
        if self.model != EMOJI_WORLD:
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
        from unweave.erasure.methods import READ_IMAGES

        if self.method not in READ_IMAGES:
            raise SelectionError(
                f"--images has no effect on {self.method!r}, which does not learn from images of "
                f"the target; leave it out or take --method {' or '.join(READ_IMAGES)}"
            )

    def _load_judge(self) -> Judge | None:
        if self.judge == "none":
            return None
        if self.judge not in (None, "recogniser"):
            raise SelectionError(f'--judge must be "recogniser" or "none", got {self.judge!r}')
        if self.model != EMOJI_WORLD:
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
        say(f"erasing {plan.target!r} from {plan.model} by {plan.method}")
        start = time.perf_counter()
        erasure = self.eraser.erase(self.pipe, self.request, seed=plan.seed, progress=True)
        seconds = time.perf_counter() - start
        say(f"erased in {seconds:.1f} s; drawing {plan.seeds} images for each prompt")
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
            say(_NO_JUDGE)
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
            neutral_prompts=self._neutral_prompts(),
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

    def _neutral_prompts(self) -> tuple[str, ...]:
        """Prompts of every fifth concept of the embedded world that was not asked for."""
        asked = (self.plan.target, *self.plan.preserve)
        names = embedded_world().trained[::5]
        return tuple(f"a {name}" for name in names if name not in asked)

    def _templates(self) -> tuple[str, ...]:
        if self.plan.kind == "object":
            return ("a {}",)
        return STYLE_TEMPLATES if self.plan.model == EMOJI_WORLD else ("a picture, {} style",)


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
