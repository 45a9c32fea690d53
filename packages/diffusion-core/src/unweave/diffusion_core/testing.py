"""Tiny random Stable Diffusion pipelines, so that every test runs in a second on a CPU."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTokenizer

_WIDTH, _SECOND_WIDTH = 32, 24
_SIZE_WIDTH = 8
_MAX_TOKENS = 77
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def tiny_pipeline(
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0
) -> StableDiffusionPipeline:
    """Build a Stable Diffusion pipeline with random weights, the same for the same `seed`.

    Images are 32x32 and latents 4x16x16; the text encoder has two layers of width 32 and reads
    up to 77 bytes. With `v_prediction` the schedule ends in zero signal and steps are trailing.
    The global random state is left as it was.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, _WIDTH))
        unet = _unet(cross_attention_dim=_WIDTH)
        vae = _vae()
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_xl_pipeline(
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon", seed: int = 0
) -> StableDiffusionXLPipeline:
    """Build a Stable Diffusion XL pipeline with random weights, the same for the same `seed`.

    As `tiny_pipeline`, with a second text encoder of width 24: the U-Net reads token states of
    width 56, pooled states of width 24 and the size of the image.
    """
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = byte_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(_text_config(tokenizer, _WIDTH))
        text_encoder_2 = CLIPTextModelWithProjection(_text_config(tokenizer, _SECOND_WIDTH))
        unet = _unet(
            cross_attention_dim=_WIDTH + _SECOND_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=_SIZE_WIDTH,
            projection_class_embeddings_input_dim=6 * _SIZE_WIDTH + _SECOND_WIDTH,
        )
        vae = _vae()
    pipe = StableDiffusionXLPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizer,
        tokenizer_2=byte_tokenizer(),
        unet=unet.eval(),
        scheduler=_scheduler(prediction_type),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def byte_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer without merges: one token a byte, 77 tokens with both ends."""
    from transformers import CLIPTokenizer

    letters = _byte_letters()
    pieces = [*letters, *(letter + "</w>" for letter in letters), _BOS, _EOS]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": _MAX_TOKENS}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=_MAX_TOKENS,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(**conditions: int | str) -> UNet2DConditionModel:
    """Return a U-Net with the given settings of what it reads beside latents and timesteps."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=8,
        **conditions,
    )


def _vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=32,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=4,
    )


def _byte_letters() -> list[str]:
    """Return GPT-2's printable stand-in for each of the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def _scheduler(prediction_type: str) -> object:
    from diffusers import DDIMScheduler

    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(
            f'`prediction_type` must be "epsilon" or "v_prediction", got {prediction_type!r}'
        )
    zero_terminal = prediction_type == "v_prediction"
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_terminal,
        timestep_spacing="trailing" if zero_terminal else "leading",
    )
