import pytest
import torch

from unweave.diffusion_core.errors import PipelineError
from unweave.diffusion_core.parameters import fingerprint, select_parameters
from unweave.diffusion_core.pipelines import generate
from unweave.diffusion_core.prompts import encode_prompts
from unweave.diffusion_core.testing import tiny_xl_pipeline
from unweave.erasure.esd import ESD, ESDConfig
from unweave.erasure.few_shot import FewShotErasing
from unweave.erasure.protocol import Erasure, ErasureRequest
from unweave.erasure.uce import UCE, UCEConfig, subject_states

REQUEST = ErasureRequest("cat", replacement="dog", preserve=("rocket", "pizza"))
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "vae")
ERASERS = {
    "uce": UCE(),
    "esd": ESD(ESDConfig(num_steps=3, num_inference_steps=4, lr=1e-3)),
}


@pytest.fixture
def xl():
    return tiny_xl_pipeline()


def fingerprints(pipe):
    return {name: fingerprint(getattr(pipe, name)) for name in COMPONENTS}


def image(pipe):
    return generate(pipe, ["a cat"], seeds=[3], num_inference_steps=3)


@pytest.mark.parametrize("name", ERASERS)
def test_only_the_cross_attention_changes_and_all_bits_come_back(xl, name, tmp_path):
    before, original = fingerprints(xl), image(xl)
    erasure = ERASERS[name].erase(xl, REQUEST, progress=False)
    assert fingerprints(xl) == before
    with erasure.apply(xl):
        erased, after = image(xl), fingerprints(xl)
    changed = {name for name in after["unet"] if after["unet"][name] != before["unet"][name]}
    assert changed and changed <= set(select_parameters(xl.unet, "cross-attention"))
    assert {**after, "unet": None} == {**before, "unet": None}
    assert fingerprints(xl) == before
    assert not torch.equal(erased, original)
    erasure.save(tmp_path / "erasure")
    loaded = Erasure.load(tmp_path / "erasure")
    assert loaded.text_encoder() is None
    with loaded.apply(xl):
        assert torch.equal(image(xl), erased)


def test_lora_file_gives_the_same_images_in_the_plain_pipeline(xl, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    original = image(xl)
    erasure = UCE().erase(xl, REQUEST)
    erasure.save(tmp_path / "erasure")
    with erasure.apply(xl):
        erased = image(xl)
    xl.save_pretrained(tmp_path / "model")
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path / "model", use_safetensors=True)
    plain.set_progress_bar_config(disable=True)
    plain.load_lora_weights(
        tmp_path / "erasure", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True
    )
    torch.testing.assert_close(image(plain), erased, rtol=0, atol=1e-5)
    assert (erased - original).abs().max() > 1e-3


def test_keys_and_values_of_both_encoders_states_become_those_of_the_guide(xl):
    weights = select_parameters(xl.unet, "cross-attention-kv")
    old = {name: weight.detach().clone() for name, weight in weights.items()}
    target, guide, kept = (
        subject_states(xl, "{}", name, "last-subject-token") for name in ("cat", "dog", "pizza")
    )
    assert target.shape == (1, 56)
    assert torch.equal(target[0], encode_prompts(xl, ["cat"])[0, 3])
    with UCE(UCEConfig(regularisation=1e-4)).erase(xl, REQUEST).apply(xl):
        for name, weight in weights.items():
            wanted = guide @ old[name].T
            assert (target @ weight.T - wanted).norm() < 1e-3 * wanted.norm()
            assert (kept @ weight.T - kept @ old[name].T).norm() < 1e-3 * wanted.norm()


def test_esd_starts_at_the_replacement_and_repeats_with_its_seed(xl):
    first, second = (ERASERS["esd"].erase(xl, REQUEST, seed=1, progress=False) for _ in range(2))
    other = ERASERS["esd"].erase(xl, ErasureRequest("cat"), seed=1, progress=False)
    assert first.history == second.history
    assert first.history[0] != other.history[0]


def test_few_shot_erasing_is_refused_with_what_works_instead(xl):
    before = fingerprints(xl)
    with pytest.raises(PipelineError, match="uce and esd work on XL"):
        FewShotErasing().erase(xl, REQUEST)
    assert fingerprints(xl) == before


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("eraser", [*ERASERS.values(), FewShotErasing()], ids=lambda e: e.name)
def test_pipelines_without_unet_or_first_encoder_are_refused(xl, eraser, part):
    setattr(xl, part, None)
    with pytest.raises(PipelineError, match=f"`{part}`"):
        eraser.erase(xl, REQUEST)


def test_an_erasure_is_bound_to_both_text_encoders(xl):
    erasure = UCE().erase(xl, REQUEST)
    with torch.no_grad():
        xl.text_encoder_2.text_projection.weight[0, 0].add_(1)
    with pytest.raises(ValueError, match="belongs to the base model"):
        erasure.apply(xl)
