"""Claims about pipelines: loaded safely, generated reproducibly, named by their weights."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from unweave.diffusion_core.errors import NonFiniteError, PipelineError, PromptError
from unweave.diffusion_core.keys import canonical_text_encoder_key
from unweave.diffusion_core.pipelines import MODELS, base_model_hash, generate, load_pipeline
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


@pytest.fixture
def saved(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """Return the folder of a saved tiny pipeline."""
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _edit_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_saved_pipeline_loads_with_the_same_weights(
    pipe: StableDiffusionPipeline, saved: Path
) -> None:
    loaded = load_pipeline(saved)
    assert loaded.safety_checker is None
    assert base_model_hash(loaded) == base_model_hash(pipe)
    images = [
        generate(model, ["a cat"], seeds=[1], num_inference_steps=2) for model in (pipe, loaded)
    ]
    assert torch.equal(*images)


def test_dtype_is_that_which_was_asked_for(saved: Path) -> None:
    loaded = load_pipeline(str(saved), dtype=torch.bfloat16)
    assert loaded.unet.dtype == loaded.text_encoder.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("emoji-wrld", "did you mean 'emoji-world'"),
        ("", "there is no model ''"),
        ("./missing/folder", r"there is no model '\./missing/folder'"),
        ("a\0b", "there is no model"),
        ("../x/../y", "there is no model"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        load_pipeline(name)


def test_every_shipped_model_is_described() -> None:
    assert "emoji-world" in MODELS and all(MODELS.values())


def test_folders_and_files_that_are_no_pipeline_are_named(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"no model_index\.json"):
        load_pipeline(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(PipelineError, match="from_single_file"):
        load_pipeline(tmp_path / "model.safetensors")


def test_a_damaged_index_is_named(saved: Path) -> None:
    for text in ("{", "[]", ""):
        (saved / "model_index.json").write_text(text)
        with pytest.raises(PipelineError, match=r"model_index\.json"):
            load_pipeline(saved)


def test_code_that_comes_with_a_model_never_runs(saved: Path, tmp_path: Path) -> None:
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')\nclass UNet: pass\n"
    (saved / "my_unet.py").write_text(code)
    (saved / "unet" / "my_unet.py").write_text(code)
    _edit_index(saved, unet=["my_unet", "UNet"])
    with pytest.raises(PipelineError, match="my_unet"):
        load_pipeline(saved)
    _edit_index(saved, unet=["diffusers", "UNet2DConditionModel"], _class_name=["my_unet", "Pipe"])
    with pytest.raises(PipelineError, match="my_unet"):
        load_pipeline(saved)
    assert not (tmp_path / "sprung").exists()


def test_other_pipeline_families_are_refused(saved: Path) -> None:
    _edit_index(saved, _class_name="FluxPipeline")
    with pytest.raises(PipelineError, match="'FluxPipeline'"):
        load_pipeline(saved)


def test_pickled_weights_are_refused(saved: Path) -> None:
    (saved / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    (saved / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(PipelineError, match="safetensors"):
        load_pipeline(saved)


def test_damaged_weights_are_refused(saved: Path) -> None:
    path = saved / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PipelineError, match="cannot load the pipeline"):
        load_pipeline(saved)


@pytest.mark.parametrize("nested", [True, False])
def test_text_encoders_of_old_and_new_transformers_load_with_their_weights(
    pipe: StableDiffusionPipeline, saved: Path, nested: bool, rewrite: Callable[..., None]
) -> None:
    def rename(name: str) -> str:
        canonical = canonical_text_encoder_key(name)
        return canonical if nested else canonical.removeprefix("text_model.")

    rewrite(saved / "text_encoder" / "model.safetensors", rename)
    assert base_model_hash(load_pipeline(saved)) == base_model_hash(pipe)


@pytest.mark.parametrize(
    ("build", "component", "kind"),
    [
        (tiny_pipeline, "text_encoder", "CLIPTextModel"),
        (tiny_xl_pipeline, "text_encoder_2", "CLIPTextModelWithProjection"),
    ],
)
def test_weights_that_the_loader_left_random_are_put_in_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], Any],
    component: str,
    kind: str,
) -> None:
    import transformers

    pipe, encoder = build(), getattr(transformers, kind)
    pipe.save_pretrained(tmp_path / "model")
    config = getattr(pipe, component).config
    monkeypatch.setattr(encoder, "from_pretrained", lambda *_, **__: encoder(config))
    assert base_model_hash(load_pipeline(tmp_path / "model")) == base_model_hash(pipe)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("text_encoder/model.safetensors", "encoder.layers.0.mlp.fc1.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.weight"),
    ],
)
def test_weights_that_are_missing_are_named(
    saved: Path, file: str, name: str, rewrite: Callable[..., None]
) -> None:
    rewrite(saved / file, lambda known: None if known.endswith(name) else known)
    with pytest.raises(PipelineError, match=name):
        load_pipeline(saved)


def test_an_unknown_device_is_refused(saved: Path) -> None:
    with pytest.raises(PipelineError, match="'abacus'"):
        load_pipeline(saved, device="abacus")


def test_an_image_depends_on_its_own_prompt_and_seed_only(pipe: StableDiffusionPipeline) -> None:
    prompts, seeds = ["a cat", "a dog", "a rocket", "a cat"], [1, 2, 3, 1]
    together = generate(pipe, prompts, seeds=seeds, num_inference_steps=2, batch_size=3)
    alone = generate(pipe, ["a rocket"], seeds=[3], num_inference_steps=2)
    assert together.shape == (4, 3, 32, 32) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together[0], together[3], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_generation_leaves_the_global_random_state(pipe: StableDiffusionPipeline) -> None:
    before = torch.get_rng_state()
    generate(pipe, ["a cat"], seeds=[1], num_inference_steps=1, negative_prompt="a dog")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompts", "seeds", "settings"),
    [
        ([], [], {}),
        ("a cat", [1], {}),
        (["a cat"], [1, 2], {}),
        ([None], [1], {}),
        (["a cat"], [1], {"batch_size": 0}),
        (["a cat"], [1], {"num_inference_steps": 0}),
    ],
)
def test_bad_requests_are_refused(
    pipe: StableDiffusionPipeline, prompts: list[str], seeds: list[int], settings: dict[str, int]
) -> None:
    with pytest.raises(PromptError, match="got"):
        generate(pipe, prompts, seeds=seeds, **settings)


def test_an_image_with_nan_is_named(pipe: StableDiffusionPipeline) -> None:
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="'a cat' with seed 7"):
        generate(pipe, ["a cat"], seeds=[7], num_inference_steps=1)


def test_the_hash_names_the_weights(pipe: StableDiffusionPipeline) -> None:
    name = base_model_hash(pipe)
    assert name == base_model_hash(tiny_pipeline()) != base_model_hash(tiny_pipeline(seed=1))
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0].add_(1e-6)
    assert base_model_hash(pipe) != name


def test_the_tiny_pipeline_is_the_same_each_time_and_leaves_random_state() -> None:
    before = torch.get_rng_state()
    pipe = tiny_pipeline("v_prediction")
    assert torch.equal(torch.get_rng_state(), before)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.alphas_cumprod[-1] < 1e-6
    with pytest.raises(ValueError, match="'x0'"):
        tiny_pipeline("x0")  # type: ignore[arg-type]
