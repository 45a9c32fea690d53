"""A toy text-to-image world that is learned in a minute, for tests of what methods do.

Images are 8x8 pixels: a background colour and one of eight 4x4 glyphs in one of four quarters.
The glyphs are orthogonal, so what an image shows can be computed instead of being learned.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unweave.diffusion_core.denoiser import Denoiser
from unweave.diffusion_core.files import save_tensors
from unweave.diffusion_core.objective import denoising_loss
from unweave.diffusion_core.pipelines import Pipeline, generate
from unweave.diffusion_core.prompts import encode_prompts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

SYNONYMS: Mapping[str, tuple[str, str]] = {
    "cat": ("kitten", "tomcat"),
    "dog": ("puppy", "hound"),
    "car": ("auto", "vehicle"),
    "tree": ("oak", "elm"),
    "house": ("home", "cottage"),
    "star": ("sun", "asterisk"),
    "fish": ("trout", "salmon"),
    "book": ("novel", "volume"),
}
"""The concepts, each with two other words that mean the same."""

BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.7, 0.3, 0.3),
    "green": (0.3, 0.7, 0.3),
    "blue": (0.3, 0.3, 0.7),
    "gray": (0.5, 0.5, 0.5),
}
"""Colours that an image can lie on."""

TEMPLATES = ("a {}", "a photo of a {}", "a picture of a {}", "one {}", "my {}", "a drawing of a {}")
"""Prompts; half of them go on with the background, as in "a cat on red"."""

SIZE, GLYPH, CONTRAST, GRAIN, SCALE = 8, 4, 0.25, 0.02, 2.0
CONTEXT = 5.0
"""Factor of the text encoder's random weights, at which a state depends on the words before it."""

_BOS, _EOS, _MAX_TOKENS = "<|startoftext|>", "<|endoftext|>", 12


@dataclass(frozen=True)
class ToyRecipe:
    """How the toy is trained."""

    steps: int = 2000
    batch_size: int = 48
    lr: float = 3e-3
    empty_rate: float = 0.15
    width: int = 32
    synonym_distance: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class ToyWorld:
    """A trained toy: its pipeline, and what its images show."""

    trained: StableDiffusionPipeline = field(repr=False)
    concepts: tuple[str, ...] = tuple(SYNONYMS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)

    @classmethod
    def load(cls, folder: str | Path, recipe: ToyRecipe | None = None) -> ToyWorld:
        """Return the toy of `recipe`, trained in about a minute unless `folder` already has it."""
        recipe = recipe or ToyRecipe()
        source = inspect.getsource(inspect.getmodule(cls))  # type: ignore[arg-type]
        name = hashlib.sha256((json.dumps(asdict(recipe)) + source).encode()).hexdigest()[:16]
        path = Path(folder) / f"{name}.safetensors"
        pipe = untrained_pipeline(recipe)
        parts = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
        if path.exists():
            parts.load_state_dict(load_file(path))
        else:
            with one_thread():
                train(pipe, recipe)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(path, parts.state_dict(), {"format": "pt"})
        parts.requires_grad_(False).eval()
        return cls(pipe)

    @property
    def synonyms(self) -> dict[str, tuple[str, str]]:
        """Two other words for each concept."""
        return dict(SYNONYMS)

    def pipeline(self) -> StableDiffusionPipeline:
        """Return a copy of the pipeline, to be edited at will."""
        return copy.deepcopy(self.trained)

    def images(
        self, concepts: Sequence[str], backgrounds: Sequence[str], generator: torch.Generator
    ) -> Tensor:
        """Draw one real image for each concept on its background; (n, 3, 8, 8) in [0, 1]."""
        chosen = torch.tensor([self.concepts.index(name) for name in concepts])
        grounds = torch.tensor([BACKGROUNDS[name] for name in backgrounds])
        return draw(chosen, grounds, generator)

    def classify(self, images: Tensor) -> Tensor:
        """Return the index of the concept that each image (n, 3, 8, 8) shows, -1 for none; (n,)."""
        scores = glyph_scores(images).flatten(2).amax(2)
        best = scores.max(1)
        return torch.where(best.values > 0.5, best.indices, -1)

    def rate(
        self,
        pipe: Pipeline,
        concept: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        **settings: Any,
    ) -> float:
        """Return the share, 0 to 1, of images of all `prompts` and `seeds` that show `concept`."""
        pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
        images = generate(
            pipe,
            [prompt for prompt, _ in pairs],
            seeds=[seed for _, seed in pairs],
            **{"num_inference_steps": 12, "guidance_scale": 3.0, "batch_size": 64, **settings},
        )
        shown = self.classify(images) == self.concepts.index(concept)
        return shown.float().mean().item()


def glyphs() -> Tensor:
    """Return the patterns of +-1 of the concepts, (8, 4, 4): orthogonal, each with mean 0."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    four = torch.kron(two, two)
    rows = torch.kron(four, four)
    return rows[[5, 6, 7, 9, 10, 11, 13, 14]].reshape(-1, GLYPH, GLYPH)


def draw(concepts: Tensor, colours: Tensor, generator: torch.Generator) -> Tensor:
    """Draw glyphs (n,) in random quarters on colours (n, 3); (n, 3, 8, 8) in [0, 1]."""
    count = len(concepts)
    quarters = torch.randint(4, (count,), generator=generator)
    canvas = torch.zeros(count, 4, GLYPH, GLYPH)
    canvas[torch.arange(count), quarters] = CONTRAST * glyphs()[concepts]
    pattern = canvas.reshape(count, 2, 2, GLYPH, GLYPH).permute(0, 1, 3, 2, 4)
    images = colours[:, :, None, None] + pattern.reshape(count, 1, SIZE, SIZE)
    noise = GRAIN * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (images + noise).clamp(0, 1)


def glyph_scores(images: Tensor) -> Tensor:
    """Return how much of each glyph is in each quarter, (n, 8, 2, 2): 1 where it was drawn."""
    kernel = glyphs()[:, None] / (CONTRAST * GLYPH * GLYPH)
    return nn.functional.conv2d(images.float().mean(1, keepdim=True), kernel, stride=GLYPH)


def untrained_pipeline(recipe: ToyRecipe) -> StableDiffusionPipeline:
    """Return the pipeline with random weights, the same for the same recipe."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = word_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=recipe.width,
                intermediate_size=2 * recipe.width,
                num_hidden_layers=2,
                num_attention_heads=2,
                initializer_factor=CONTEXT,
                max_position_embeddings=_MAX_TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        _embed_words(text_encoder, tokenizer, recipe.synonym_distance)
        unet = UNet2DConditionModel(
            sample_size=SIZE,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=recipe.width,
            attention_head_dim=2,
            norm_num_groups=8,
        )
    pipe = StableDiffusionPipeline(
        vae=_identity_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            prediction_type="epsilon",
            timestep_spacing="trailing",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train(pipe: StableDiffusionPipeline, recipe: ToyRecipe) -> None:
    """Train the U-Net on drawn images and the states of their prompts, the text encoder frozen."""
    denoiser = Denoiser.from_pipeline(pipe)
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=recipe.lr, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    prompts = all_prompts()
    with torch.no_grad():
        states = encode_prompts(pipe, ["", *(text for text, _, _ in prompts)])
    concepts = torch.tensor([list(SYNONYMS).index(concept) for _, concept, _ in prompts])
    grounds = torch.tensor([list(BACKGROUNDS).index(ground) for _, _, ground in prompts])
    colours = torch.tensor(list(BACKGROUNDS.values()))
    for _ in range(recipe.steps):
        rows = torch.randint(len(prompts), (recipe.batch_size,), generator=generator)
        images = draw(concepts[rows], colours[grounds[rows]], generator)
        clean = SCALE * (images * 2 - 1)
        named = torch.rand(len(rows), generator=generator) >= recipe.empty_rate
        t = torch.randint(denoiser.num_train_timesteps, (len(rows),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        loss = denoising_loss(denoiser, clean, states[(rows + 1) * named], t, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, so that a toy does not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def all_prompts() -> list[tuple[str, str, str]]:
    """Return each (prompt, concept, background); half of the prompts name the background."""
    return [
        (template.format(word) + ending, concept, ground)
        for concept, others in SYNONYMS.items()
        for word in (concept, *others)
        for template in TEMPLATES
        for ground in BACKGROUNDS
        for ending in ("", f" on {ground}")
    ]


def word_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer to which each word of the toy's prompts is one token."""
    import tempfile

    from transformers import CLIPTokenizer

    words = {word for text in TEMPLATES for word in text.replace("{}", "on").split()}
    words |= {word for pair in SYNONYMS.items() for word in (pair[0], *pair[1])} | {*BACKGROUNDS}
    vocabulary, merges = _merged(sorted(words))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": _MAX_TOKENS}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _merged(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return the vocabulary and the merges that build each word from its end to its beginning."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys([*letters, *(letter + "</w>" for letter in letters)])
    merges: dict[str, None] = {}
    for word in words:
        tail = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges[f"{letter} {tail}"] = None
            tail = letter + tail
            pieces[tail] = None
    pieces |= dict.fromkeys([_BOS, _EOS])
    return {piece: index for index, piece in enumerate(pieces)}, list(merges)


@torch.no_grad()
def _embed_words(text_encoder: nn.Module, tokenizer: CLIPTokenizer, distance: float) -> None:
    """Give words far embeddings, but synonyms near ones, as a trained text encoder would."""
    table: Tensor = text_encoder.get_input_embeddings().weight  # type: ignore[operator]
    table.normal_()
    for concept, others in SYNONYMS.items():
        rows = tokenizer.convert_tokens_to_ids([f"{word}</w>" for word in (concept, *others)])
        table[rows[1:]] = table[rows[0]] + distance * table[rows[1:]]


def _identity_autoencoder() -> Any:
    """Return an autoencoder whose latents are the images."""
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin

    class IdentityAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]
        @register_to_config  # type: ignore[untyped-decorator]
        def __init__(
            self, scaling_factor: float = SCALE, block_out_channels: tuple[int, ...] = (3,)
        ) -> None:
            super().__init__()
            self.register_buffer("place", torch.zeros(1))

        def encode(self, images: Tensor) -> SimpleNamespace:
            moments = SimpleNamespace(mean=images, std=torch.zeros_like(images))
            return SimpleNamespace(latent_dist=moments)

        def decode(
            self, latents: Tensor, return_dict: bool = True, generator: Any = None
        ) -> tuple[Tensor]:
            return (latents,)

    return IdentityAutoencoder()
