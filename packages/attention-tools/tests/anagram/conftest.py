"""Fixtures: a tiny random pipeline of the DeepFloyd IF form, and its tokenizer."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

SIDE = 32


@pytest.fixture(scope="session")
def tokenizer():
    """A unigram tokenizer of the T5 form that knows few words whole."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁an", "▁of", "▁painting", "▁red", "▁fox"]
    pieces += [*"abcdefghijklmnopqrstuvwxyz", "▁old", "▁tree", "flower", "▁sun", ",", ".", "!"]
    scored = [(piece, -10.0 if len(piece) == 1 else -2.0) for piece in pieces]
    inner = Tokenizer(models.Unigram(scored, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77,
    )


@pytest.fixture(scope="session")
def pixel_pipe(tokenizer):
    """A tiny pipeline of the DeepFloyd IF form: T5, added-KV attention, learned variances."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
        )
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            in_channels=3,
            out_channels=6,
            cross_attention_dim=32,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
            norm_num_groups=8,
        )
        # Random attention is nearly even: sharper scores give concepts places of their own.
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "add_k_proj.weight")):
                parameter.data.mul_(4)
        encoder = T5EncoderModel(text)
    pipe = IFPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.double().eval(),
        unet=unet.double().eval(),  # so that 1e-6 tells a formula from rounding
        scheduler=DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            sample_max_value=1.0,
            variance_type="learned_range",
        ),
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
