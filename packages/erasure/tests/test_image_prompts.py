import pytest
import torch

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ArtifactError, PipelineError, PromptError
from unweave.diffusion_core.parameters import fingerprint
from unweave.diffusion_core.pipelines import base_model_hash
from unweave.diffusion_core.prompts import encode_conditions
from unweave.diffusion_core.teacher import frozen_teacher
from unweave.diffusion_core.testing import tiny_pipeline, tiny_xl_pipeline
from unweave.erasure.image_prompts import (
    ADAPTER_FILE,
    ImagePrompts,
    ImagePromptsConfig,
    clip_image_encoder,
    image_prompts_off,
    train_image_prompts,
    with_image,
)

NUM_TEXT_TOKENS = 77
QUICK = ImagePromptsConfig(num_steps=2, batch_size=2)


def image_encoder(seed=0):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=8,
                projection_dim=12,
            )
        )
    return encoder.eval()


def with_encoder(pipe):
    from transformers import CLIPImageProcessor

    extractor = CLIPImageProcessor(size=32, crop_size=32)
    pipe.register_modules(image_encoder=image_encoder(), feature_extractor=extractor)
    return pipe


def pictures(count=3):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def seeing():
    """A pipeline with image encoder, and no adapter."""
    return with_encoder(tiny_pipeline())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapter, _ = train_image_prompts(
        with_encoder(tiny_pipeline()), pictures(2), ["a cat", "a dog"], QUICK, progress=False
    )
    adapter.save(folder, torch.float32)
    return folder


def noisy_and_states(pipe, count=2):
    noisy = torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return noisy, torch.tensor([400]), encode_conditions(pipe, ["a cat"])


def test_the_saved_file_is_read_by_diffusers_and_acts_the_same(seeing, saved):
    noisy, t, states = noisy_and_states(seeing)
    adapter = ImagePrompts.load(saved, seeing.unet)
    embeds = adapter.embed(pictures(2))
    with torch.no_grad(), adapter.attached(seeing.unet, NUM_TEXT_TOKENS) as unet:
        ours = Denoiser(unet, seeing.scheduler).predict(
            noisy, t, with_image(states, adapter.tokens(embeds))
        )
    seeing.load_ip_adapter(
        saved, subfolder="", weight_name=ADAPTER_FILE, local_files_only=True, use_safetensors=True
    )
    from_pil = seeing.encode_image(list(_as_arrays(pictures(2))), "cpu", 1)[0]
    torch.testing.assert_close(from_pil, embeds, rtol=0, atol=1e-6)
    with torch.no_grad():
        theirs = seeing.unet(
            noisy,
            t,
            states.hidden_states.expand(2, -1, -1),
            added_cond_kwargs={"image_embeds": [embeds[:, None]]},
        ).sample
    torch.testing.assert_close(ours.raw, theirs, rtol=0, atol=1e-6)
    again = ImagePrompts.of(seeing).to_tensors()
    for name, tensor in adapter.to_tensors().items():
        assert torch.equal(tensor, again[name])


def _as_arrays(images):
    return images.mul(255).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("build", [tiny_pipeline, tiny_xl_pipeline])
def test_the_image_adds_up_with_the_text_at_full_scale(build):
    pipe = with_encoder(build())
    adapter, _ = train_image_prompts(pipe, pictures(2), ["a cat", ""], QUICK, progress=False)
    noisy, t, states = noisy_and_states(pipe)
    tokens = adapter.tokens(adapter.embed(pictures(2)))
    plain = Denoiser.from_pipeline(pipe)
    with torch.no_grad():
        without = plain.predict(noisy, t, states).raw
        with adapter.attached(pipe.unet, NUM_TEXT_TOKENS) as unet:
            attached = Denoiser(unet, pipe.scheduler, pipe.vae_scale_factor)
            text_only = attached.predict(noisy, t, states).raw
            joint = attached.predict(noisy, t, with_image(states, tokens)).raw
            for processor in adapter.processors.values():
                processor.scale = [0.0]
            scaled = attached.predict(noisy, t, with_image(states, tokens)).raw
    torch.testing.assert_close(text_only, without, rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled, without, rtol=0, atol=1e-6)
    assert (joint - without).abs().max() > 1e-3


def test_the_unet_is_the_same_object_for_object_when_the_adapter_is_off_again(seeing, saved):
    adapter = ImagePrompts.load(saved, seeing.unet)
    before = fingerprint(seeing.unet), dict(seeing.unet.attn_processors)
    kind = seeing.unet.config.encoder_hid_dim_type
    with pytest.raises(RuntimeError), adapter.attached(seeing.unet, NUM_TEXT_TOKENS):
        raise RuntimeError
    assert fingerprint(seeing.unet) == before[0]
    after = seeing.unet.attn_processors
    assert all(after[path] is processor for path, processor in before[1].items())
    assert seeing.unet.encoder_hid_proj is None
    assert seeing.unet.config.encoder_hid_dim_type == kind


def test_two_unets_can_have_the_adapter_on_at_once(seeing, saved):
    adapter = ImagePrompts.load(saved, seeing.unet)
    noisy, t, states = noisy_and_states(seeing)
    teacher = frozen_teacher(seeing.unet, ["conv_in.weight"])
    joint = with_image(states, adapter.tokens(adapter.embed(pictures(2))))
    with (
        torch.no_grad(),
        adapter.attached(seeing.unet, NUM_TEXT_TOKENS) as first,
        adapter.attached(teacher, NUM_TEXT_TOKENS) as second,
    ):
        outputs = [Denoiser(u, seeing.scheduler).predict(noisy, t, joint) for u in (first, second)]
        seeing.unet.conv_in.weight.mul_(2)
        moved = Denoiser(first, seeing.scheduler).predict(noisy, t, joint)
        still = Denoiser(second, seeing.scheduler).predict(noisy, t, joint)
    assert torch.equal(outputs[0].raw, outputs[1].raw)
    assert torch.equal(still.raw, outputs[1].raw) and not torch.equal(moved.raw, still.raw)


def test_a_loaded_adapter_is_taken_off_and_put_back(seeing, saved):
    hash_without = base_model_hash(seeing)
    _load(seeing, saved)
    seeing.set_ip_adapter_scale(0.3)
    loaded = dict(seeing.unet.attn_processors)
    adapter = ImagePrompts.of(seeing)
    assert all(processor.scale == [1.0] for processor in adapter.processors.values())
    with image_prompts_off(seeing):
        assert base_model_hash(seeing) == hash_without
    after = seeing.unet.attn_processors
    assert all(after[path] is processor for path, processor in loaded.items())
    assert seeing.unet.config.encoder_hid_dim_type == "ip_image_proj"
    assert {p.scale[0] for p in after.values() if hasattr(p, "to_k_ip")} == {0.3}


def _load(pipe, folder):
    pipe.load_ip_adapter(
        folder,
        subfolder="",
        weight_name=ADAPTER_FILE,
        image_encoder_folder=None,
        local_files_only=True,
    )


def test_training_lowers_the_loss_and_changes_nothing_else(seeing):
    parts = ("unet", "vae", "text_encoder", "image_encoder")
    before = [fingerprint(getattr(seeing, part)) for part in parts]
    config = ImagePromptsConfig(num_steps=40, batch_size=4, drop_image=0.0, lr=3e-3)
    adapter, losses = train_image_prompts(
        seeing, pictures(2), ["a cat", "a dog"], config, progress=False
    )
    again, repeated = train_image_prompts(
        seeing, pictures(2), ["a cat", "a dog"], config, progress=False
    )
    assert [fingerprint(getattr(seeing, part)) for part in parts] == before
    assert losses == repeated
    assert sum(losses[-10:]) < 0.97 * sum(losses[:10])
    for name, tensor in adapter.to_tensors().items():
        assert torch.equal(tensor, again.to_tensors()[name])
    assert not any(p.requires_grad for p in adapter.projection.parameters())


def test_a_clip_tower_reads_pixels_of_openai_statistics_like_its_own():
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {**vision, "vocab_size": 99, "bos_token_id": 97, "eos_token_id": 98}
    del text["image_size"], text["patch_size"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    encoder = clip_image_encoder(clip.eval(), [0.5] * 3, [0.5] * 3)
    mean, std = torch.tensor(
        [[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]]
    )
    pixels = pictures()
    with torch.no_grad():
        own = clip.visual_projection(clip.vision_model(2 * pixels - 1).pooler_output)
        theirs = encoder((pixels - mean[:, None, None]) / std[:, None, None]).image_embeds
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-6)
    assert own.abs().max() > 1e-2


def test_pipelines_without_adapter_or_encoder_are_told_the_way_out(pipe, saved):
    with pytest.raises(PipelineError, match=r"has no IP-Adapter.*load_ip_adapter"):
        ImagePrompts.of(pipe)
    with pytest.raises(PipelineError, match=r"`image_encoder`.*register_modules"):
        train_image_prompts(pipe, pictures(1), [""])
    with pytest.raises(ArtifactError, match=ADAPTER_FILE):
        ImagePrompts.load(saved / "nothing", pipe.unet)
    with pytest.raises(PipelineError, match="does not fit"):
        ImagePrompts.load(saved, tiny_xl_pipeline().unet)
    assert not any(hasattr(p, "to_k_ip") for p in pipe.unet.attn_processors.values())


def test_prompts_and_images_must_agree_in_number(seeing):
    with pytest.raises(PromptError, match="expected 3 prompts"):
        train_image_prompts(seeing, pictures(3), ["a cat"])


@pytest.mark.parametrize("settings", [{"num_steps": 0}, {"drop_text": 1.0}, {"lr": -1.0}])
def test_bad_settings_are_named(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
        ImagePromptsConfig(**settings)
