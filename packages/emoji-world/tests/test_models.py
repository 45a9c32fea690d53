"""The shipped models: they load anywhere, and what they know is seen on a few images."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from unweave.emoji_world import World, load_clip, load_pipeline, load_recogniser, pipeline_path
from unweave.emoji_world.models import MODELS_PATH
from unweave.emoji_world.scenes import SceneDataset, SceneObject, SceneSpec, compose
from unweave.emoji_world.train.recogniser import noise_images

README = Path(__file__).parents[1] / "README.md"


def pixels(*specs: SceneSpec) -> torch.Tensor:
    images = [torch.from_numpy(compose(spec).image.copy()) for spec in specs]
    return torch.stack(images).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def drawn():
    """Six prompts and their images `(6, 3, 64, 64)`."""
    prompts = [
        f"a {concept} on a {background} background"
        for concept, background in zip(
            ("cat face", "pizza", "frog", "star", "rocket", "strawberry"),
            ("red", "white", "black", "blue", "green", "pink"),
            strict=True,
        )
    ]
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipe(
        prompts,
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=generators,
        output_type="pt",
    ).images
    return prompts, images


def test_all_weights_are_small_half_precision_safetensors() -> None:
    files = list(MODELS_PATH.rglob("*.safetensors"))
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) < 48e6
    for file in files:
        with safe_open(file, "pt") as content:
            types = {content.get_slice(name).get_dtype() for name in content.keys()}  # noqa: SIM118
        assert types <= {"F16", "I64"}
    assert not [path for path in MODELS_PATH.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_old_and_new_transformers_find_the_names_and_the_vocabulary_they_read() -> None:
    with safe_open(pipeline_path() / "text_encoder/model.safetensors", "pt") as content:
        assert all(name.startswith("text_model.") for name in content.keys())  # noqa: SIM118
    for folder in (pipeline_path() / "tokenizer", MODELS_PATH / "clip"):
        assert {"vocab.json", "merges.txt", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


def test_the_pipeline_predicts_velocity_down_to_zero_signal() -> None:
    pipe = load_pipeline()
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    assert not pipe.text_encoder.training and pipe.unet.config.sample_size == 16


def test_backgrounds_and_most_objects_are_those_of_the_prompt(
    drawn: tuple[list[str], torch.Tensor],
) -> None:
    prompts, images = drawn
    recogniser = load_recogniser()
    grounds = [World.backgrounds[index] for index in recogniser.backgrounds(images).tolist()]
    assert all(f"on a {ground} " in prompt for ground, prompt in zip(grounds, prompts, strict=True))
    found = [
        {recogniser.concepts[index] for index in row.nonzero().flatten().tolist()}
        for row in recogniser.detect(images)
    ]
    right = [any(f"a {c} on" in p for c in names) for names, p in zip(found, prompts, strict=True)]
    assert sum(right) >= 4, list(zip(prompts, found, strict=True))


def test_the_recogniser_names_concepts_styles_and_backgrounds() -> None:
    dataset = SceneDataset(60, seed=7)
    specs = [dataset.scene(index).spec for index in range(len(dataset))]
    images, recogniser = pixels(*specs), load_recogniser()
    right = sum(
        {recogniser.concepts[index] for index in row.nonzero().flatten().tolist()}
        == {item.concept for item in spec.objects}
        for row, spec in zip(recogniser.detect(images), specs, strict=True)
    )
    styles = [World.styles[index] for index in recogniser.styles(images).tolist()]
    grounds = [World.backgrounds[index] for index in recogniser.backgrounds(images).tolist()]
    assert right >= 51
    assert sum(s == spec.objects[0].style for s, spec in zip(styles, specs, strict=True)) >= 54
    assert grounds == [spec.background for spec in specs]


def test_the_recogniser_sees_nothing_in_noise_and_empty_scenes() -> None:
    noise = torch.cat([noise_images(4, torch.Generator().manual_seed(seed)) for seed in range(8)])
    empty = pixels(*(SceneSpec((), background=ground) for ground in World.backgrounds))
    assert load_recogniser().detect(noise).any(1).float().mean() <= 0.05
    assert not load_recogniser().detect(empty).any()


def test_clip_finds_the_caption_of_an_image_among_all_concepts() -> None:
    scorer = load_clip()
    specs = [SceneSpec((SceneObject(name, "twemoji"),)) for name in World.trained]
    scores = (
        scorer.image_features(pixels(*specs))
        @ scorer.text_features([f"a {name}" for name in World.trained]).T
    )
    assert (scores.argmax(1) == torch.arange(len(specs))).float().mean() >= 0.6


def test_the_examples_of_the_readme_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(README), "exec"), {})
