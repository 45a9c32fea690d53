"""What unweave-diffusion-core says about reliability, measured."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from claims_runner import Claim, Measure
from unweave.diffusion_core import generate, load_pipeline
from unweave.diffusion_core.files import sha256_of

SOURCE = "unweave, diffusion-core"
TRAIN = """
import sys, time
import torch
from unweave.diffusion_core.files import save_tensors
from unweave.diffusion_core.training import run_training
folder = sys.argv[1]
torch.manual_seed(0)
layers = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(), torch.nn.Linear(64, 1))
parameters = dict(layers.named_parameters())
optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
def loss(index, generator):
    return layers(torch.randn(16, 8, generator=generator)).sub(1).square().mean()
def told(step, loss):
    print(step, flush=True)
    time.sleep(0.002)
run_training(loss, parameters, optimizer, num_steps=200, seed=0, progress=False, on_step=told,
             checkpoint_dir=folder + "/run", checkpoint_every=5)
save_tensors(folder + "/result.safetensors", parameters)
"""


def resume_after_kills(seed: int, quick: bool) -> Claim:
    """SIGKILL at random moments, continue each time, and compare the result's bytes."""
    kills, chance = (2 if quick else 15), random.Random(seed)
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as parts:
        subprocess.run([sys.executable, "-c", TRAIN, whole], check=True, stdout=subprocess.DEVNULL)
        killed = sum(_killed_run(parts, chance) for _ in range(kills))
        subprocess.run([sys.executable, "-c", TRAIN, parts], check=True, stdout=subprocess.DEVNULL)
        digests = {sha256_of(Path(folder) / "result.safetensors") for folder in (whole, parts)}
    return Claim.identical(
        "resume-after-kills",
        "Training that is killed at random moments ends with the bytes of an unbroken run",
        SOURCE,
        f"200 steps, {killed} SIGKILLs, AdamW and dropout",
        same=len(digests) == 1 and killed == kills,
        note=f"{killed} of {kills} runs were killed before their end",
    )


def batch_independence(seed: int, quick: bool) -> Claim:
    """The same prompts and seeds, drawn one by one and all at once."""
    pipe = load_pipeline("emoji-world")
    prompts = [f"a {name}" for name in ("pizza", "cat face", "rocket", "star")] * 2
    seeds = list(range(seed, seed + len(prompts)))
    steps = 4 if quick else 25
    together = generate(pipe, prompts, seeds=seeds, num_inference_steps=steps, batch_size=8)
    alone = generate(pipe, prompts, seeds=seeds, num_inference_steps=steps, batch_size=1)
    difference = (together - alone).abs().max().item()
    return Claim.at_most(
        "batch-independence",
        "An image depends on its prompt and seed, not on the batch it is drawn in",
        SOURCE,
        f"largest pixel difference of 8 images in one batch and in 8, {steps} steps",
        value=difference,
        limit=1e-3,
        digits=".2g",
        note="sums of other lengths are rounded differently",
    )


def import_time(seed: int, quick: bool) -> Claim:
    """Seconds to import the package less those to import torch, in fresh interpreters."""
    times = {
        name: statistics.median(_seconds(f"import {name}") for _ in range(1 if quick else 7))
        for name in ("torch", "unweave.diffusion_core")
    }
    extra = times["unweave.diffusion_core"] - times["torch"]
    return Claim.at_most(
        "import-time",
        "Importing the package takes under a second beyond torch",
        SOURCE,
        "median of fresh interpreters, warm disk",
        value=max(extra, 0.0),
        limit=1,
        unit="s",
        digits=".2f",
        note="the machine was busy",
    )


def _killed_run(folder: str, chance: random.Random) -> bool:
    """Start the training, kill it after some steps; say whether it was still running."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN, folder], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(chance.randint(1, 20)):
        process.stdout.readline()
    time.sleep(0.01 * chance.random())
    process.kill()
    process.stdout.close()
    return process.wait() == -9


def _seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


CLAIMS: dict[str, Measure] = {
    "resume-after-kills": resume_after_kills,
    "batch-independence": batch_independence,
    "import-time": import_time,
}
