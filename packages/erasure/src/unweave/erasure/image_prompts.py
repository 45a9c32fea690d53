"""Image prompts: IP-Adapters (arXiv 2308.06721) beside a U-Net, put on and off, trained and saved.

The text tokens of a prompt and the tokens of an image go through attentions of their own, whose
results add up. diffusers' loader and attention processors do the work; here an adapter can be held
apart from the U-Net, so that what trains the U-Net neither sees nor changes it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.errors import ArtifactError, PipelineError, PromptError
from unweave.diffusion_core.files import atomic_folder, load_tensors, save_tensors
from unweave.diffusion_core.latents import ImageSource, encode_images, load_images
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.parameters import train_only
from unweave.diffusion_core.pipelines import Pipeline, text_encoders
from unweave.diffusion_core.prompts import PromptStates, encode_conditions
from unweave.diffusion_core.training import run_training
from unweave.erasure.protocol import check_number, check_pipeline, check_trainable

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPVisionModelWithProjection

ADAPTER_FILE = "ip-adapter.safetensors"
"""Name of an adapter's weights; pass it to `pipe.load_ip_adapter` as `weight_name`."""

ENCODER_FOLDER = "image_encoder"
NUM_TOKENS = 4
"""Tokens of an image, which the layout of the public adapters fixes."""

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_BATCH = 32
_WAY_OUT = (
    "load one first, such as pipe.load_ip_adapter('h94/IP-Adapter', subfolder='models', "
    "weight_name='ip-adapter_sd15.safetensors'), or train one with train_image_prompts"
)


@dataclass(frozen=True)
class ImagePrompts:
    """An IP-Adapter of one U-Net, held apart from it, with its encoder of images.

    `processors` are the processors of the attentions that read text, by path; `projection` makes
    tokens of an image's embedding. `encoder` gives `.image_embeds` (n, d) for pixels, which
    `extractor` makes of images.
    """

    processors: Mapping[str, Any]
    projection: nn.Module
    encoder: nn.Module
    extractor: Any

    @classmethod
    def of(cls, pipe: Pipeline) -> ImagePrompts:
        """Return the adapter that `pipe` has loaded; it keeps it, and weights are shared.

        The scale of the image is 1 here, whatever it is in the pipeline. Raises `PipelineError`
        when there is none, more than one, one that reads patches or faces, or no image encoder.
        """
        from diffusers.models.embeddings import ImageProjection

        processors = _image_processors(pipe.unet)
        if not processors:
            raise PipelineError(f"this {type(pipe).__name__} has no IP-Adapter: {_WAY_OUT}")
        layers = pipe.unet.encoder_hid_proj.image_projection_layers
        if len(layers) != 1 or not isinstance(layers[0], ImageProjection):
            kinds = ", ".join(type(layer).__name__ for layer in layers)
            raise PipelineError(
                f"expected one IP-Adapter that reads the embedding of the whole image, got {kinds}:"
                " call pipe.unload_ip_adapter() and load a plain one, such as ip-adapter_sd15"
            )
        _check_encoder(pipe)
        return cls(
            {path: _at_full_scale(processor) for path, processor in processors.items()},
            layers[0],
            pipe.image_encoder,
            pipe.feature_extractor,
        )

    @classmethod
    def from_tensors(
        cls, unet: Any, tensors: Mapping[str, Tensor], encoder: nn.Module, extractor: Any
    ) -> ImagePrompts:
        """Make the adapter of `unet` from the tensors of a file, by their names there.

        Raises `PipelineError` when they belong to another U-Net or another kind of adapter.
        """
        parts = {
            part: {
                name.removeprefix(f"{part}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{part}.")
            }
            for part in ("image_proj", "ip_adapter")
        }
        with _put_back(unet):
            try:
                unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
            except (KeyError, RuntimeError, ValueError) as error:
                raise PipelineError(
                    f"the IP-Adapter does not fit this U-Net: {error!r}; take that of its base "
                    "model, with one embedding for the whole image"
                ) from error
            projection = unet.encoder_hid_proj.image_projection_layers[0]
            return cls(_image_processors(unet), projection, encoder, extractor)

    @classmethod
    def load(cls, folder: str | Path, unet: Any) -> ImagePrompts:
        """Read what `save` wrote, with its image encoder, as the adapter of `unet`.

        Raises `ArtifactError` when a file is missing or damaged, `PipelineError` when the adapter
        belongs to another U-Net.
        """
        from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

        folder = Path(folder)
        tensors = load_tensors(folder / ADAPTER_FILE)
        try:
            encoder = CLIPVisionModelWithProjection.from_pretrained(
                folder / ENCODER_FOLDER, use_safetensors=True, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{str(folder)!r} holds no image encoder in {ENCODER_FOLDER!r}: {error}"
            ) from error
        size = encoder.config.image_size
        extractor = CLIPImageProcessor(size=size, crop_size=size)
        return cls.from_tensors(unet, tensors, encoder.to(unet.device, unet.dtype), extractor)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the adapter in the layout of the public ones, and the image encoder.

        `pipe.load_ip_adapter(folder, subfolder="", weight_name=ADAPTER_FILE)` reads it. Encoders
        without `save_pretrained` are left out: pass `image_encoder_folder=None` then.
        """
        tensors = {name: tensor.to(dtype) for name, tensor in self.to_tensors().items()}
        with atomic_folder(folder) as new:
            save_tensors(new / ADAPTER_FILE, tensors, {"format": "pt"})
            if hasattr(self.encoder, "save_pretrained"):
                encoder: Any = copy.deepcopy(self.encoder).to(dtype)
                encoder.save_pretrained(new / ENCODER_FOLDER, safe_serialization=True)

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the weights by the names that files give them."""
        tensors = {
            f"image_proj.{name.replace('image_embeds', 'proj')}": tensor
            for name, tensor in self.projection.state_dict().items()
        }
        for index, processor in enumerate(self.processors.values()):
            for part in ("to_k_ip", "to_v_ip"):
                weight = getattr(processor, part)[0].weight.detach()
                tensors[f"ip_adapter.{2 * index + 1}.{part}.weight"] = weight
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def embed(self, images: Tensor, **extractor_settings: Any) -> Tensor:
        """Return the embeddings (n, d) of images (n, 3, H, W) in [0, 1].

        `extractor_settings` go to the feature extractor, such as another `image_mean`.
        """
        return _embed(self.encoder, self.extractor, images, **extractor_settings)

    def tokens(self, embeds: Tensor) -> Tensor:
        """Return the tokens (n, 4, width) of embeddings (n, d)."""
        project: Any = self.projection
        tokens: Tensor = project(embeds)
        return tokens

    @contextlib.contextmanager
    def attached(self, unet: Any, num_text_tokens: int) -> Iterator[ImagePromptedUNet]:
        """Yield `unet` with the adapter on; at the end it has its own processors again.

        The adapter's weights are those of this object: several U-Nets can have them on at once.
        """
        with _put_back(unet):
            unet.set_attn_processor({**unet.attn_processors, **self.processors})
            unet.encoder_hid_proj = _AsGiven()
            unet.config.encoder_hid_dim_type = "ip_image_proj"
            yield ImagePromptedUNet(unet, num_text_tokens)


class ImagePromptedUNet(nn.Module):
    """A U-Net with an adapter on, whose hidden states may carry image tokens after the text's.

    With `num_text_tokens` tokens, and none of an image, it is the plain U-Net.
    """

    def __init__(self, unet: Any, num_text_tokens: int) -> None:
        super().__init__()
        self.unet, self.num_text_tokens = unet, num_text_tokens

    @property
    def config(self) -> Any:
        """The configuration of the U-Net."""
        return self.unet.config

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Split the hidden states (n, text tokens + image tokens, width) and run the U-Net."""
        text, image = (
            encoder_hidden_states[:, : self.num_text_tokens],
            encoder_hidden_states[:, self.num_text_tokens :],
        )
        added = {**(added_cond_kwargs or {}), "image_embeds": [image] if image.shape[1] else []}
        return self.unet(sample, timestep, text, added_cond_kwargs=added, return_dict=return_dict)


@contextlib.contextmanager
def image_prompts_off(pipe: Pipeline) -> Iterator[None]:
    """Take the adapter that `pipe` has loaded, if any, off its U-Net while the block runs."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    with _put_back(pipe.unet):
        loaded = _image_processors(pipe.unet)
        if loaded:
            plain = {path: AttnProcessor2_0() for path in loaded}
            pipe.unet.set_attn_processor({**pipe.unet.attn_processors, **plain})
            pipe.unet.encoder_hid_proj = None
            pipe.unet.config.encoder_hid_dim_type = None
        yield


def with_image(states: PromptStates, tokens: Tensor) -> PromptStates:
    """Return the states of prompts with the tokens (n, k, width) of n images after the text's."""
    states = states.expand(len(tokens))
    joint = torch.cat([states.hidden_states, tokens.to(states.hidden_states)], 1)
    return PromptStates(joint, states.pooled)


@dataclass(frozen=True)
class ImagePromptsConfig:
    """Settings of the training of an adapter.

    `drop_text` and `drop_image` are the shares of samples with the empty prompt and without image.
    """

    num_steps: int = 1000
    lr: float = 1e-3
    batch_size: int = 32
    drop_text: float = 0.3
    drop_image: float = 0.1

    def __post_init__(self) -> None:
        for name in ("num_steps", "lr", "batch_size"):
            check_number(name, getattr(self, name), "positive", lambda x: x > 0)
        for name in ("drop_text", "drop_image"):
            check_number(name, getattr(self, name), "in [0, 1)", lambda x: 0 <= x < 1)


def train_image_prompts(
    pipe: Pipeline,
    images: ImageSource | Sequence[ImageSource],
    prompts: Sequence[str],
    config: ImagePromptsConfig | None = None,
    *,
    seed: int = 0,
    progress: bool = True,
) -> tuple[ImagePrompts, list[float]]:
    """Train an adapter on images with a prompt each; return it and the loss of each step.

    `pipe` must have an `image_encoder` and a `feature_extractor`, and does not change: projection,
    image keys and image values are trained by the denoising loss (arXiv 2308.06721), the latter
    two from the U-Net's own for text. Raises `PipelineError` without an image encoder,
    `PromptError` when prompts and images differ in number.
    """
    config = config or ImagePromptsConfig()
    check_pipeline(pipe)
    _check_encoder(pipe)
    pixels = load_images(images, pipe.unet.config.sample_size * pipe.vae_scale_factor)
    if len(prompts) != len(pixels):
        raise PromptError(f"expected {len(pixels)} prompts, one an image, got {len(prompts)}")
    generator = torch.Generator().manual_seed(seed)
    with image_prompts_off(pipe), torch.no_grad():
        embeds = _embed(pipe.image_encoder, pipe.feature_extractor, (pixels + 1) / 2)
        adapter = _untrained(pipe, embeds.shape[1], generator)
        latents = encode_images(pipe.vae, pixels, generator).to(embeds)
        states = PromptStates.cat(
            [
                encode_conditions(pipe, prompts[i : i + _BATCH])
                for i in range(0, len(prompts), _BATCH)
            ]
        )
        states = PromptStates.cat([encode_conditions(pipe, [""]), states])
    modules = nn.ModuleList([adapter.projection, *adapter.processors.values()])
    parameters = dict(modules.named_parameters())
    check_trainable(parameters)
    frozen = (pipe.unet, pipe.vae, pipe.image_encoder, *text_encoders(pipe).values())
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr)
    with (
        image_prompts_off(pipe),
        train_only([modules, *frozen], parameters),
        adapter.attached(pipe.unet, states.hidden_states.shape[1]) as unet,
    ):
        denoiser = Denoiser(unet, pipe.scheduler, pipe.vae_scale_factor)

        def step_fn(_: int, generator: torch.Generator) -> Tensor:
            rows = torch.randint(len(pixels), (config.batch_size,), generator=generator)
            text = torch.rand(len(rows), generator=generator) >= config.drop_text
            image = torch.rand(len(rows), generator=generator) >= config.drop_image
            shape = latents[rows].shape
            noise = torch.randn(shape, generator=generator).to(latents)
            t = torch.randint(denoiser.num_train_timesteps, (len(rows),), generator=generator)
            shown = embeds[rows] * image.to(embeds)[:, None]
            prompt = states.select(torch.where(text, rows + 1, 0))
            joint = with_image(prompt, adapter.tokens(shown))
            return denoising_loss(denoiser, latents[rows], joint, t.to(noise.device), noise)

        losses = run_training(
            step_fn, parameters, optimizer, num_steps=config.num_steps, seed=seed, progress=progress
        )
    modules.requires_grad_(False)
    return adapter, losses


def clip_image_encoder(
    clip: CLIPModel, mean: Sequence[float], std: Sequence[float]
) -> CLIPVisionModelWithProjection:
    """Return the image tower of a CLIP as an encoder for `pipe.load_ip_adapter`.

    diffusers normalises pixels by OpenAI's statistics. The tower learned from pixels normalised by
    `mean` and `std`; the difference goes into its patch and position embeddings, which is exact.
    """
    from transformers import CLIPVisionModelWithProjection

    settings = copy.deepcopy(clip.config.vision_config)
    settings.projection_dim = clip.config.projection_dim
    encoder = CLIPVisionModelWithProjection(settings)
    known = encoder.state_dict().keys()
    encoder.load_state_dict({k: v for k, v in clip.state_dict().items() if k in known})
    embeddings: Any = next(m for m in encoder.modules() if hasattr(m, "patch_embedding"))
    kernel = embeddings.patch_embedding.weight
    own_mean, own_std = torch.tensor(mean), torch.tensor(std)
    gain = torch.tensor(_CLIP_STD) / own_std
    shift = (torch.tensor(_CLIP_MEAN) - own_mean) / own_std
    with torch.no_grad():
        offset = (kernel * shift[:, None, None]).sum((1, 2, 3))
        embeddings.position_embedding.weight[1:] += offset
        kernel *= gain[:, None, None]
    return encoder.eval().requires_grad_(False)


class _AsGiven(nn.Module):
    """Stands where a U-Net projects image embeddings, for tokens that are projected already."""

    def forward(self, tokens: list[Tensor]) -> list[Tensor]:
        return tokens


def _embed(encoder: Any, extractor: Any, images: Tensor, **extractor_settings: Any) -> Tensor:
    weight = next(encoder.parameters())
    parts = []
    for batch in images.split(_BATCH):
        arrays = batch.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = extractor(list(arrays), return_tensors="pt", **extractor_settings)
        parts.append(encoder(pixels["pixel_values"].to(weight)).image_embeds)
    return torch.cat(parts)


@contextlib.contextmanager
def _put_back(unet: Any) -> Iterator[None]:
    """Give `unet` the attention processors and the projection that it has now back at the end."""
    processors, projection = dict(unet.attn_processors), unet.encoder_hid_proj
    kind = unet.config.encoder_hid_dim_type
    try:
        yield
    finally:
        unet.set_attn_processor(processors)
        unet.encoder_hid_proj = projection
        unet.config.encoder_hid_dim_type = kind


def _image_processors(unet: Any) -> dict[str, Any]:
    return {path: part for path, part in unet.attn_processors.items() if hasattr(part, "to_k_ip")}


def _at_full_scale(processor: Any) -> Any:
    """Return a processor with the same weights that adds the image at scale 1."""
    shared = copy.copy(processor)
    shared.scale = [1.0]
    return shared


def _check_encoder(pipe: Pipeline) -> None:
    for part in ("image_encoder", "feature_extractor"):
        if getattr(pipe, part, None) is None:
            raise PipelineError(
                f"this {type(pipe).__name__} has no `{part}`, without which images are not read: "
                "pipe.register_modules(image_encoder=..., feature_extractor=...) with a "
                "CLIPVisionModelWithProjection and a CLIPImageProcessor"
            )


def _untrained(pipe: Pipeline, embed_width: int, generator: torch.Generator) -> ImagePrompts:
    """Return an adapter with a random projection and the keys and values that text has."""
    width = pipe.unet.config.cross_attention_dim
    weight = torch.randn(NUM_TOKENS * width, embed_width, generator=generator) / embed_width**0.5
    tensors = {
        "image_proj.proj.weight": weight,
        "image_proj.proj.bias": torch.zeros(NUM_TOKENS * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    crossing = [path for path in pipe.unet.attn_processors if not path.endswith("attn1.processor")]
    for index, path in enumerate(crossing):
        attention = pipe.unet.get_submodule(path.removesuffix(".processor"))
        for part in ("to_k", "to_v"):
            own = getattr(attention, part).weight.detach().clone()
            tensors[f"ip_adapter.{2 * index + 1}.{part}_ip.weight"] = own
    return ImagePrompts.from_tensors(pipe.unet, tensors, pipe.image_encoder, pipe.feature_extractor)
