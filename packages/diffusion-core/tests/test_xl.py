"""Claims about Stable Diffusion XL: it works where 1.x and 2.x do, as its own pipeline does it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from unweave.diffusion_core.denoiser import Denoiser, classifier_free
from unweave.diffusion_core.errors import ArtifactError, PipelineError, PromptError
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.pipelines import (
    base_model_hash,
    base_weights,
    generate,
    hash_weights,
    load_pipeline,
)
from unweave.diffusion_core.prompts import PromptStates, encode_conditions, encode_prompts
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.diffusion_core.tokens import add_tokens
from unweave.diffusion_core.trajectories import partial_trajectory
from unweave.diffusion_core.weight_delta import WeightDelta

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

STEPS, SCALE = 5, 4.0
SECOND_WEIGHTS = "text_encoder_2/model.safetensors"


@pytest.fixture
def xl() -> StableDiffusionXLPipeline:
    return tiny_xl_pipeline()


@pytest.fixture
def saved(xl: StableDiffusionXLPipeline, tmp_path: Path) -> Path:
    xl.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _states(pipe: Any, *prompts: str) -> PromptStates:
    with torch.no_grad():
        return encode_conditions(pipe, prompts)


def _noise(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(0))


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_conditions_are_those_of_the_pipeline(xl: StableDiffusionXLPipeline) -> None:
    prompts = ["a cat", "", "x" * 200]
    states = _states(xl, *prompts)
    hidden, _, pooled, _ = xl.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert states.pooled is not None
    assert states.hidden_states.shape == (3, 77, 56) and states.pooled.shape == (3, 24)
    assert torch.equal(states.hidden_states, hidden) and torch.equal(states.pooled, pooled)
    assert torch.equal(encode_prompts(xl, prompts), hidden)


def test_stable_diffusion_1_has_no_pooled_states(pipe: StableDiffusionPipeline) -> None:
    states = _states(pipe, "a cat")
    assert states.pooled is None
    assert torch.equal(states.hidden_states, encode_prompts(pipe, ["a cat"]))


def test_gradients_flow_to_both_text_encoders(xl: StableDiffusionXLPipeline) -> None:
    states = encode_conditions(xl, ["a cat"])
    assert states.pooled is not None
    (states.hidden_states.sum() + states.pooled.sum()).backward()
    for encoder in (xl.text_encoder, xl.text_encoder_2):
        assert encoder.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("hidden", "pooled"), [((77, 56), None), ((2, 77, 56), (3, 24)), ((2, 77, 56), (2, 1, 24))]
)
def test_states_that_do_not_fit_each_other_are_refused(
    hidden: tuple[int, ...], pooled: tuple[int, ...] | None
) -> None:
    with pytest.raises(PromptError, match=r"\(n, tokens, width\)"):
        PromptStates(torch.zeros(hidden), None if pooled is None else torch.zeros(pooled))


def test_a_prediction_is_that_of_the_unet_told_pooled_states_and_size(
    xl: StableDiffusionXLPipeline,
) -> None:
    noisy, t, states = _noise(2, 8, 12), torch.tensor([10, 700]), _states(xl, "a cat", "a dog")
    sizes = torch.tensor([[16.0, 24.0, 0.0, 0.0, 16.0, 24.0]] * 2)
    added = {"text_embeds": states.pooled, "time_ids": sizes}
    with torch.no_grad():
        expected = xl.unet(noisy, t, states.hidden_states, added_cond_kwargs=added).sample
        raw = Denoiser.from_pipeline(xl).predict(noisy, t, states).raw
    assert torch.equal(raw, expected)


def test_without_a_pipeline_a_latent_stands_for_8_pixels(xl: StableDiffusionXLPipeline) -> None:
    noisy, states = _noise(1, 8, 12), _states(xl, "a cat")
    added = {"text_embeds": states.pooled, "time_ids": torch.tensor([[64.0, 96, 0, 0, 64, 96]])}
    with torch.no_grad():
        expected = xl.unet(noisy, 10, states.hidden_states, added_cond_kwargs=added).sample
        raw = Denoiser(xl.unet, xl.scheduler).predict(noisy, torch.tensor(10), states).raw
    torch.testing.assert_close(raw, expected)


def test_one_prompt_serves_for_all_latents(xl: StableDiffusionXLPipeline) -> None:
    denoiser, noisy, t = Denoiser.from_pipeline(xl), _noise(3), torch.tensor(5)
    with torch.no_grad():
        together = denoiser.predict(noisy, t, _states(xl, "a cat")).raw
        repeated = denoiser.predict(noisy, t, _states(xl, *["a cat"] * 3)).raw
    torch.testing.assert_close(together, repeated, rtol=1e-4, atol=1e-5)


def test_a_plain_tensor_is_refused_by_the_unet_of_xl_alone(xl: StableDiffusionXLPipeline) -> None:
    t, states = torch.tensor(5), encode_prompts(xl, ["a cat"])
    for given in (states, PromptStates(states)):
        with pytest.raises(PipelineError, match="encode_conditions"):
            Denoiser.from_pipeline(xl).predict(_noise(1), t, given)
    pipe = tiny_pipeline()
    denoiser, states = Denoiser.from_pipeline(pipe), encode_prompts(pipe, ["a cat"])
    first, second = (
        denoiser.predict(_noise(1), t, given).raw for given in (states, PromptStates(states))
    )
    assert torch.equal(first, second)


def test_the_denoising_loss_is_the_error_of_the_prediction(xl: StableDiffusionXLPipeline) -> None:
    denoiser, (clean, noise), t = Denoiser.from_pipeline(xl), _noise(2).split(1), torch.tensor([9])
    states = encode_conditions(xl, ["a cat"])
    loss = denoising_loss(denoiser, clean, states, t, noise)
    raw = denoiser.predict(denoiser.add_noise(clean, noise, t), t, states).raw
    torch.testing.assert_close(loss, (raw - noise).square().mean())
    loss.backward()
    assert xl.text_encoder_2.text_projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_trajectory_to_the_end_gives_the_latents_of_the_pipeline(kind: Any) -> None:
    xl, noise = tiny_xl_pipeline(kind), _noise(2)
    expected = xl(
        ["a cat"] * 2,
        negative_prompt=["a dog"] * 2,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=noise.clone(),
        output_type="latent",
    ).images
    denoiser, cond, uncond = Denoiser.from_pipeline(xl), _states(xl, "a cat"), _states(xl, "a dog")
    latents, t = partial_trajectory(
        denoiser,
        xl.scheduler,
        cond,
        uncond,
        stop_step=STEPS - 1,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        noise=noise,
    )
    with torch.no_grad():
        last = classifier_free(
            denoiser.predict(latents, t, uncond), denoiser.predict(latents, t, cond), SCALE
        )
    latents = xl.scheduler.step(last.raw, int(t[0]), latents).prev_sample
    torch.testing.assert_close(latents, expected, rtol=0, atol=1e-4)


def test_a_trajectory_without_guidance_is_that_of_the_pipeline(
    xl: StableDiffusionXLPipeline,
) -> None:
    noise, seen = _noise(1), []

    def record(_: Any, __: int, ___: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"].clone())
        return {}

    xl(
        "a cat",
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        latents=noise.clone(),
        output_type="latent",
        callback_on_step_end=record,
    )
    states = _states(xl, "a cat")
    for stop_step in range(1, STEPS):
        latents, _ = partial_trajectory(
            Denoiser.from_pipeline(xl),
            xl.scheduler,
            states,
            states,
            stop_step=stop_step,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            noise=noise,
        )
        torch.testing.assert_close(latents, seen[stop_step - 1], rtol=0, atol=1e-4)


def test_a_saved_pipeline_loads_with_the_same_weights_and_images(
    xl: StableDiffusionXLPipeline, saved: Path
) -> None:
    loaded = load_pipeline(saved)
    assert type(loaded) is type(xl)
    assert base_model_hash(loaded) == base_model_hash(xl)
    images = [
        generate(model, ["a cat"], seeds=[1], num_inference_steps=2) for model in (xl, loaded)
    ]
    assert images[0].shape == (1, 3, 32, 32) and torch.equal(*images)
    assert load_pipeline(saved, dtype=torch.bfloat16).text_encoder_2.dtype == torch.bfloat16


@pytest.mark.parametrize("zeros", [True, False])
def test_what_stands_for_no_negative_prompt_is_as_the_checkpoint_says(
    saved: Path, zeros: bool
) -> None:
    _edit_index(saved, force_zeros_for_empty_prompt=zeros)
    assert load_pipeline(saved).config.force_zeros_for_empty_prompt is zeros


@pytest.mark.parametrize("name", ["layers.0.mlp.fc1.weight", "text_projection.weight"])
def test_weights_that_the_second_encoder_lacks_are_named(
    saved: Path, name: str, rewrite: Callable[..., None]
) -> None:
    rewrite(saved / SECOND_WEIGHTS, lambda known: None if known.endswith(name) else known)
    with pytest.raises(PipelineError, match=rf"text_encoder_2.*{name}"):
        load_pipeline(saved)


def test_pickled_weights_of_the_second_encoder_are_refused(saved: Path) -> None:
    (saved / SECOND_WEIGHTS).rename(saved / "text_encoder_2" / "pytorch_model.bin")
    with pytest.raises(PipelineError, match="safetensors"):
        load_pipeline(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_encoder": [None, None], "tokenizer": [None, None]}, "no first text encoder"),
        (
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None]},
            "refiner",
        ),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "'StableDiffusionXLInpaintPipeline'"),
        ({"text_encoder_2": [None, None]}, "no 'text_encoder_2'"),
        ({"text_encoder_2": ["my_encoder", "Encoder"]}, "my_encoder"),
    ],
)
def test_refiners_other_families_and_foreign_classes_are_refused(
    saved: Path, changes: dict[str, object], message: str
) -> None:
    _edit_index(saved, **changes)
    with pytest.raises(PipelineError, match=message):
        load_pipeline(saved)


def test_the_base_hash_names_the_weights_of_the_second_encoder(
    xl: StableDiffusionXLPipeline,
) -> None:
    before = base_model_hash(xl)
    assert before == base_model_hash(tiny_xl_pipeline())
    with torch.no_grad():
        xl.text_encoder_2.text_projection.weight[0, 0].add_(1e-3)
    assert base_model_hash(xl) != before


def test_the_base_hash_of_stable_diffusion_1_is_of_unet_and_text_encoder_alone(
    pipe: StableDiffusionPipeline,
) -> None:
    weights = {name: base_weights(pipe, name) for name in ("unet", "text_encoder")}
    assert base_model_hash(pipe) == hash_weights(weights)


def test_a_delta_of_the_second_encoder_is_applied_and_reverted(
    xl: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    before = {name: weight.clone() for name, weight in xl.text_encoder_2.state_dict().items()}
    with torch.no_grad():
        xl.text_encoder_2.text_projection.weight.add_(0.1)
    trained = xl.text_encoder_2.text_projection.weight.detach().clone()
    delta = WeightDelta.from_weights({"text_encoder_2": before}, xl, method="test")
    delta.save(tmp_path / "delta")
    xl.text_encoder_2.load_state_dict(before)
    loaded = WeightDelta.load(tmp_path / "delta")
    with loaded.apply(xl):
        torch.testing.assert_close(xl.text_encoder_2.text_projection.weight, trained)
    for name, weight in xl.text_encoder_2.state_dict().items():
        assert torch.equal(weight, before[name])
    with pytest.raises(ArtifactError, match="text_encoder_2"):
        loaded.apply(tiny_pipeline())


def test_tokens_that_only_one_encoder_would_know_are_refused(
    xl: StableDiffusionXLPipeline,
) -> None:
    with pytest.raises(PipelineError, match="two text encoders"):
        add_tokens(xl, ["<cat>"])


def test_the_tiny_pipeline_is_the_same_each_time_and_leaves_random_state() -> None:
    before = torch.get_rng_state()
    first, second = tiny_xl_pipeline("v_prediction", seed=1), tiny_xl_pipeline(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert base_model_hash(first) == base_model_hash(second) != base_model_hash(tiny_xl_pipeline())
    assert first.scheduler.config.prediction_type == "v_prediction"
