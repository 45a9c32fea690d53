"""Claims about CLIP models: embeddings can be replaced, and features found in any output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from unweave.diffusion_core.clip import clip_features, token_embedding_override
from unweave.diffusion_core.errors import PromptError, UnweaveError

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

IDS = torch.tensor([[512, 5, 6, 513], [512, 7, 8, 513]])


def test_overriding_with_the_same_embeddings_changes_nothing(
    pipe: StableDiffusionPipeline,
) -> None:
    expected = pipe.text_encoder(IDS)[0]
    embeds = pipe.text_encoder.get_input_embeddings()(IDS)
    with token_embedding_override(pipe.text_encoder, embeds):
        assert torch.equal(pipe.text_encoder(torch.zeros_like(IDS))[0], expected)


def test_gradients_flow_to_the_embeddings_given(pipe: StableDiffusionPipeline) -> None:
    embeds = torch.randn(1, 4, 32, requires_grad=True)
    with token_embedding_override(pipe.text_encoder, embeds):
        states = pipe.text_encoder(IDS)[0]
    torch.testing.assert_close(states[0], states[1])
    states[..., 0].sum().backward()
    assert embeds.grad is not None and embeds.grad.any()


def test_the_encoder_is_itself_again_after_the_block_and_after_an_error(
    pipe: StableDiffusionPipeline,
) -> None:
    expected = pipe.text_encoder(IDS)[0]
    with token_embedding_override(pipe.text_encoder, torch.randn(1, 4, 32)):
        assert not torch.equal(pipe.text_encoder(IDS)[0], expected)
    with pytest.raises(RuntimeError), token_embedding_override(pipe.text_encoder, torch.zeros(1)):
        raise RuntimeError
    assert torch.equal(pipe.text_encoder(IDS)[0], expected)


@pytest.mark.parametrize("shape", [(3, 4, 32), (1, 5, 32), (1, 4, 31), (4, 32)])
def test_embeddings_of_another_shape_are_refused(
    pipe: StableDiffusionPipeline, shape: tuple[int, ...]
) -> None:
    with (
        token_embedding_override(pipe.text_encoder, torch.zeros(shape)),
        pytest.raises(PromptError, match=r"\(2, 4, 32\)"),
    ):
        pipe.text_encoder(IDS)


def test_features_are_found_in_what_a_real_clip_model_returns() -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "projection_dim": 6}
    text = {**small, **heads, "vocab_size": 10, "eos_token_id": 9}
    config = CLIPConfig(
        text_config=text,
        vision_config={**small, **heads, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    model = CLIPModel(config).eval()
    ids, images = torch.tensor([[1, 2, 9]]), torch.randn(2, 3, 8, 8)
    outputs = model(input_ids=ids, pixel_values=images)
    for features, expected in (
        (clip_features(model.get_text_features(input_ids=ids)), outputs.text_embeds),
        (clip_features(model.get_image_features(pixel_values=images)), outputs.image_embeds),
    ):
        normalised = torch.nn.functional.normalize(features, dim=-1)
        torch.testing.assert_close(normalised, expected)
    projected = CLIPTextModelWithProjection(config.text_config).eval()(ids)
    assert clip_features(projected) is projected.text_embeds


def test_features_of_older_versions_are_the_tensor_itself() -> None:
    features = torch.zeros(2, 3)
    assert clip_features(features) is features
    assert clip_features(SimpleNamespace(pooler_output=features)) is features


def test_an_output_without_features_is_named() -> None:
    with pytest.raises(UnweaveError, match="dict"):
        clip_features({})
