"""What unweave-erasure says about erasing from the embedded pipeline, measured."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean

import torch
from safetensors.torch import load_file
from torch import Tensor

from claims_runner import Claim, Measure
from unweave.diffusion_core import bootstrap_interval, fingerprint, generate, load_pipeline
from unweave.emoji_world import World, load_recogniser, pipeline_path
from unweave.erasure import Eraser, ErasureRequest, make_eraser
from unweave.erasure.erase_run import EVALUATION_SEED, STYLE_TEMPLATES

SOURCES = {"few-shot": "arXiv 2405.07288", "uce": "arXiv 2308.14761", "esd": "arXiv 2303.07345"}
TARGETS = (
    *("cat face", "panda", "frog", "turtle", "pizza", "strawberry", "doughnut", "rocket"),
    *("bicycle", "guitar", "soccer ball", "star"),
)
STYLES = ("openmoji", "fluent")
MISSED = "settings are one recipe for all targets of a small model"
PLAIN_SCRIPT = """
import sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel
base, erasure, out, prompt = sys.argv[1:]
options = {}
if (Path(erasure) / "text_encoder").is_dir():
    options["text_encoder"] = CLIPTextModel.from_pretrained(erasure + "/text_encoder")
pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, **options)
if not options:
    pipe.load_lora_weights(erasure, weight_name="pytorch_lora_weights.safetensors")
pipe.set_progress_bar_config(disable=True)
images = pipe([prompt] * 4, num_inference_steps=25, guidance_scale=4.0, output_type="pt",
              generator=[torch.Generator().manual_seed(seed) for seed in range(4)]).images
assert not [name for name in sys.modules if name.split(".")[0] == "unweave"]
save_file({"images": images.contiguous()}, out)
"""


@dataclass(frozen=True)
class Outcome:
    """Rates of one erasure: the target before and after, and the drop of each other concept."""

    target: str
    before: float
    after: float
    drops: tuple[float, ...]
    seconds: float

    @property
    def drop(self) -> float:
        """Mean drop over the others."""
        return mean(self.drops)

    def __str__(self) -> str:
        return f"{self.target} {self.before:.0%} to {self.after:.0%}, others {-self.drop:+.1%}"


def target_rate(method: str, kind: str, seed: int, quick: bool) -> Claim:
    """Mean recognition of the targets after their erasure."""
    results = outcomes(method, kind, seed, quick)
    rates = [100 * result.after for result in results]
    before = mean(result.before for result in results)
    return Claim(
        id=f"{method}-{kind}-target",
        text=f"{method}: an erased {kind} is no longer recognised in images of its prompts",
        source=SOURCES[method],
        setting=f"{_setting(results, quick)}; {before:.0%} before",
        aim="<= 15 % on average",
        measured=f"{mean(rates):.1f} %",
        interval=_interval(rates),
        holds=mean(rates) <= 15,
        note="" if mean(rates) <= 15 else MISSED,
    )


def others_drop(method: str, kind: str, seed: int, quick: bool) -> Claim:
    """Mean drop of recognition of everything that was not erased."""
    results = outcomes(method, kind, seed, quick)
    drops = [100 * result.drop for result in results]
    return Claim(
        id=f"{method}-{kind}-others",
        text=f"{method}: other {kind}s stay",
        source=SOURCES[method],
        setting=_setting(results, quick),
        aim="mean drop <= 5 points",
        measured=f"{mean(drops):.1f} points",
        interval=_interval(drops),
        holds=mean(drops) <= 5,
        note="" if mean(drops) <= 5 else MISSED,
    )


def each_target(method: str, seed: int, quick: bool) -> Claim:
    """Every number behind the means."""
    results = outcomes(method, "object", seed, quick) + outcomes(method, "style", seed, quick)
    good = [result for result in results if result.after <= 0.15 and result.drop <= 0.05]
    return Claim(
        id=f"{method}-each",
        text=f"{method}: every target alone, with the mean change of the others",
        source=SOURCES[method],
        setting="as above",
        aim="each <= 15 % and others within 5 points",
        measured=f"{len(good)} of {len(results)}",
        interval=None,
        holds=len(good) == len(results),
        note="; ".join(map(str, results)),
    )


def seconds_taken(method: str, seed: int, quick: bool) -> Claim:
    """The slowest erasure, images it draws for itself included."""
    results = outcomes(method, "object", seed, quick) + outcomes(method, "style", seed, quick)
    slowest = max(result.seconds for result in results)
    return Claim(
        id=f"{method}-seconds",
        text=f"{method}: one erasure is quick, on a CPU",
        source=SOURCES[method],
        setting=f"slowest of {len(results)}",
        aim="<= 60 s",
        measured=f"{slowest:.1f} s",
        interval=None,
        holds=slowest <= 60,
        note="" if slowest <= 60 else "the machine was busy, or has less than two common cores",
    )


def plain_diffusers(method: str, seed: int, quick: bool) -> Claim:
    """A script that imports only diffusers and transformers draws the same images."""
    with tempfile.TemporaryDirectory() as folder:
        saved, out = Path(folder) / "erasure", Path(folder) / "images.safetensors"
        pipe = load_pipeline("emoji-world")
        erasure = _eraser(method).erase(pipe, _request("cat face", "object"), progress=False)
        erasure.save(saved)
        with erasure.apply(pipe):
            ours = generate(pipe, ["a cat face"] * 4, seeds=range(4), batch_size=4)
        arguments = [str(pipeline_path()), str(saved), str(out), "a cat face"]
        subprocess.run([sys.executable, "-c", PLAIN_SCRIPT, *arguments], check=True)
        difference = (load_file(out)["images"] - ours).abs().max().item()
    return Claim(
        id=f"{method}-plain-diffusers",
        text=f"{method}: the saved erasure works in plain diffusers, without unweave",
        source=SOURCES[method],
        setting="4 images of one prompt",
        aim="largest pixel difference <= 0.002",
        measured=f"{difference:.2g}",
        interval=None,
        holds=difference <= 0.002,
        note="" if difference <= 0.002 else "pixels in [0, 1]",
    )


def bit_exact_revert(method: str, seed: int, quick: bool) -> Claim:
    """Weights before applying and after reverting have the same bits."""
    pipe = load_pipeline("emoji-world")
    modules = {name: getattr(pipe, name) for name in ("unet", "text_encoder", "vae")}
    erasure = _eraser(method).erase(pipe, _request("cat face", "object"), progress=False)
    before = {name: fingerprint(module) for name, module in modules.items()}
    with erasure.apply(pipe):
        changed = [n for n, module in modules.items() if fingerprint(module) != before[n]]
    same = {name: fingerprint(module) for name, module in modules.items()} == before
    return Claim(
        id=f"{method}-revert",
        text=f"{method}: reverting restores every bit of every weight",
        source=SOURCES[method],
        setting=f"SHA-256 of all weights; the erasure changes the {' and '.join(changed)}",
        aim="identical",
        measured="identical" if same else "different",
        interval=None,
        holds=same and bool(changed),
        note="" if same and changed else "a defect",
    )


@cache
def outcomes(method: str, kind: str, seed: int, quick: bool) -> tuple[Outcome, ...]:
    """Erase each target from the fresh pipeline and judge it and all others."""
    names = (TARGETS if kind == "object" else STYLES)[: 1 if quick else None]
    return tuple(_outcome(method, kind, name, seed, quick) for name in names)


def _outcome(method: str, kind: str, target: str, seed: int, quick: bool) -> Outcome:
    pipe = load_pipeline("emoji-world")
    start = time.perf_counter()
    erasure = _eraser(method, kind).erase(pipe, _request(target, kind), seed=seed, progress=False)
    seconds = time.perf_counter() - start
    before = baseline_rates(kind, seed, quick)
    others = _others(target, kind)[: 3 if quick else None]
    with erasure.apply(pipe):
        after = _rate(pipe, target, kind, _seeds(seed, quick))
        kept = {name: _rate(pipe, name, kind, _few_seeds(seed, kind)) for name in others}
    drops = tuple(before[name][1] - kept[name] for name in others)
    return Outcome(target, before[target][0], after, drops, seconds)


@cache
def baseline_rates(kind: str, seed: int, quick: bool) -> dict[str, tuple[float, float]]:
    """Rates of the unedited pipeline, by name, over all seeds and over the few of the others."""
    pipe = load_pipeline("emoji-world")
    targets = (TARGETS if kind == "object" else STYLES)[: 1 if quick else None]
    others = _others(targets[0], kind)[: 3 if quick else None]
    names = dict.fromkeys((*targets, *others))
    few, many = _few_seeds(seed, kind), _seeds(seed, quick)
    return {
        name: (
            _rate(pipe, name, kind, many) if name in targets else 0.0,
            _rate(pipe, name, kind, few),
        )
        for name in names
    }


def _rate(pipe: object, name: str, kind: str, seeds: range) -> float:
    templates = ("a {}",) if kind == "object" else STYLE_TEMPLATES
    prompts = [template.replace("{}", name) for template in templates for _ in seeds]
    images = generate(pipe, prompts, seeds=list(seeds) * len(templates))  # type: ignore[arg-type]
    return _recognised(images, name, kind).float().mean().item()


def _recognised(images: Tensor, name: str, kind: str) -> Tensor:
    recogniser = load_recogniser()
    if kind == "object":
        return recogniser.detect(images)[:, recogniser.concepts.index(name)]
    return recogniser.styles(images) == World.styles.index(name)


def _request(target: str, kind: str) -> ErasureRequest:
    return ErasureRequest(target, preserve=_others(target, kind), kind=kind)  # type: ignore[arg-type]


def _eraser(method: str, kind: str = "object") -> Eraser:
    return make_eraser(method, "emoji-world", kind)  # type: ignore[arg-type]


def _others(target: str, kind: str) -> tuple[str, ...]:
    names = World.trained if kind == "object" else World.styles
    return tuple(name for name in names if name != target)


def _seeds(seed: int, quick: bool) -> range:
    return range(EVALUATION_SEED + seed, EVALUATION_SEED + seed + (2 if quick else 16))


def _few_seeds(seed: int, kind: str) -> range:
    return range(EVALUATION_SEED + seed, EVALUATION_SEED + seed + (2 if kind == "object" else 4))


def _setting(results: tuple[Outcome, ...], quick: bool) -> str:
    images = len(_seeds(0, quick))
    return f"{len(results)} targets, {images} images a prompt, {len(results[0].drops)} others each"


def _interval(values: list[float]) -> tuple[float, float] | None:
    if len(values) < 3:
        return None
    low, high = bootstrap_interval(torch.tensor(values))
    return round(low, 1), round(high, 1)


MEASURED = ("few-shot", "uce")
CLAIMS: dict[str, Measure] = {}
for _method in MEASURED:
    for _kind in ("object", "style"):
        CLAIMS[f"{_method}-{_kind}-target"] = partial(target_rate, _method, _kind)
        CLAIMS[f"{_method}-{_kind}-others"] = partial(others_drop, _method, _kind)
    CLAIMS[f"{_method}-each"] = partial(each_target, _method)
    CLAIMS[f"{_method}-seconds"] = partial(seconds_taken, _method)
    CLAIMS[f"{_method}-plain-diffusers"] = partial(plain_diffusers, _method)
    CLAIMS[f"{_method}-revert"] = partial(bit_exact_revert, _method)
