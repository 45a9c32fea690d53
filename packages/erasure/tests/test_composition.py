"""Several saved erasures in one pipeline: weight deltas and LoRA files add up exactly."""

import itertools

import pytest
import torch

from unweave.diffusion_core.changes import as_dense
from unweave.diffusion_core.keys import base_parameters
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.testing import tiny_pipeline
from unweave.erasure.esd import ESD, ESDConfig
from unweave.erasure.protocol import Erasure, ErasureRequest
from unweave.erasure.rece import RECE
from unweave.erasure.uce import UCE

NAMES = ("uce", "rece", "esd")


@pytest.fixture
def saved(pipe, tmp_path):
    """Folders of three erasures of different concepts and methods, each made on the same base."""
    erasers = {
        "uce": (UCE(), ErasureRequest("cat", replacement="dog")),
        "rece": (RECE(), ErasureRequest("pizza", replacement="bread")),
        "esd": (
            ESD(ESDConfig(num_steps=2, num_inference_steps=2, lr=1e-3)),
            ErasureRequest("rocket"),
        ),
    }
    for name, (eraser, request) in erasers.items():
        eraser.erase(pipe, request, progress=False).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)))
def test_loaded_erasures_add_up_and_come_off_in_any_order(pipe, saved, order):
    before = fingerprint(pipe.unet)
    original = {name: p.detach().clone() for name, p in base_parameters("unet", pipe.unet).items()}
    erasures = {name: Erasure.load(saved / name) for name in NAMES}
    strengths = dict(zip(NAMES, (1.0, 0.5, 2.0), strict=True))
    for name in order:
        erasures[name].apply(pipe, strengths[name])
    for name, parameter in base_parameters("unet", pipe.unet).items():
        expected = original[name] + sum(
            strengths[method] * as_dense(erasure.delta.deltas["unet"][name])
            for method, erasure in erasures.items()
            if name in erasure.delta.deltas["unet"]
        )
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-6)
    for name in sorted(order):
        erasures[name].revert(pipe)
    assert fingerprint(pipe.unet) == before


def test_an_erasure_made_on_top_of_another_adds_to_it(pipe, saved):
    """What UCE makes while another edit is applied equals UCE on weights with that edit in them."""
    first = Erasure.load(saved / "esd")
    request = ErasureRequest("cat", replacement="dog")
    with first.apply(pipe):
        on_top = UCE().erase(pipe, request)
        edited = {n: p.detach().clone() for n, p in base_parameters("unet", pipe.unet).items()}
    plain = tiny_pipeline()
    with torch.no_grad():
        for name, parameter in base_parameters("unet", plain.unet).items():
            parameter.copy_(edited[name])
    expected = UCE().erase(plain, request).delta.deltas["unet"]
    for name, change in on_top.delta.deltas["unet"].items():
        torch.testing.assert_close(change.dense(), expected[name].dense())
    assert on_top.delta.meta.base_hash == first.delta.meta.base_hash


def test_merged_erasures_are_one_lora_of_summed_rank(pipe, saved):
    first, second = (Erasure.load(saved / name) for name in ("uce", "rece"))
    merged = first.delta.merge(second.delta)
    assert merged.low_rank
    for name, change in merged.deltas["unet"].items():
        parts = [erasure.delta.deltas["unet"][name] for erasure in (first, second)]
        assert change.rank == parts[0].rank + parts[1].rank
        torch.testing.assert_close(change.dense(), parts[0].dense() + parts[1].dense())


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_lora_files_of_two_erasures_add_up_in_diffusers_own_loader(pipe, saved):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, 4, 16, 16, generator=generator)

    def output(of):
        with torch.no_grad():
            return of.unet(noisy, 500, encode_prompts(of, ["a cat"])).sample

    other = tiny_pipeline()
    for name in ("uce", "rece"):
        other.load_lora_weights(
            saved / name,
            weight_name="pytorch_lora_weights.safetensors",
            adapter_name=name,
            use_safetensors=True,
        )
    other.set_adapters(["uce", "rece"], [1.0, 0.5])
    original = output(pipe)
    with Erasure.load(saved / "uce").apply(pipe), Erasure.load(saved / "rece").apply(pipe, 0.5):
        both = output(pipe)
    torch.testing.assert_close(output(other), both, rtol=0, atol=1e-5)
    assert (both - original).abs().max() > 1e-3
