"""A newcomer erases a concept from the embedded pipeline and hands the result to others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from unweave.diffusion_core import fingerprint, generate, load_pipeline
from unweave.emoji_world import pipeline_path
from unweave.erasure import Erasure

UNWEAVE = "from unweave.cli.app import main; main()"
PLAIN_DIFFUSERS = Path(__file__).parents[1] / "plain_diffusers.py"


def draw(pipe: Any) -> torch.Tensor:
    return generate(pipe, ["a cat face"] * 4, seeds=range(4), num_inference_steps=25)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("method", ["uce", "few-shot"])
def test_erase_look_undo_and_give_away(tmp_path: Path, method: str) -> None:
    command = [sys.executable, "-c", UNWEAVE, "erase", "cat face", "--method", method]
    options = ["--preserve", "pizza", "--seeds", "4", "--steps", "15", "--json", "--out", "cat"]
    finished = subprocess.run(
        [*command, *options], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    told = json.loads(finished.stdout)
    before, after = told["target_rate"]["before"], told["target_rate"]["after"]
    assert before >= 0.75
    assert after <= 0.25
    assert told["preserved"]["pizza"]["after"] >= told["preserved"]["pizza"]["before"] - 0.25
    assert all((tmp_path / path).exists() for path in told["files"].values())

    weights = tmp_path / told["files"]["weights"]
    pipe, erasure = load_pipeline("emoji-world"), Erasure.load(weights)
    untouched, first = fingerprint(pipe.unet) | fingerprint(pipe.text_encoder), draw(pipe)
    with erasure.apply(pipe):
        erased = draw(pipe)
    assert fingerprint(pipe.unet) | fingerprint(pipe.text_encoder) == untouched
    assert torch.equal(draw(pipe), first)

    arguments = [str(pipeline_path()), str(weights), str(tmp_path / "plain.safetensors")]
    command = [sys.executable, str(PLAIN_DIFFUSERS), *arguments, "a cat face"]
    subprocess.run(command, check=True)
    plain = load_file(tmp_path / "plain.safetensors")["images"]
    torch.testing.assert_close(plain, erased, rtol=0, atol=2e-3)
    assert (plain - first).abs().mean() > 10 * (plain - erased).abs().mean()
