"""A CLIP whose image encoder reads noisy images and their time, to score views as they are.

Anagram-MTL (arXiv 2412.02693, section 3.3) rates views by the noised CLIP of GLIDE (Nichol et al.
2021, arXiv 2112.10741): an encoder of x_t and t, learned by CLIP's loss on noised images. Here
the encoder starts from that of an ordinary CLIP, whose text encoder stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from unweave.attention_tools.errors import AttentionError
from unweave.attention_tools.scores import PromptFeatures, text_features, unit_features

BatchAt = Callable[[int], tuple[Tensor, Sequence[str]]]
"""Images (n, C, H, W) without noise, as the diffusion model knows them, and their captions, by
step: pixels in [-1, 1], or latents that are scaled."""


@dataclass(frozen=True)
class NoisyCLIPConfig:
    """How the encoder is learned; the defaults are of a small model, GLIDE's are not known."""

    steps: int = 1000
    lr: float = 5e-4
    """The highest learning rate of AdamW; it rises first, and falls to nothing."""

    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0 or self.weight_decay < 0:
            raise AttentionError(
                "`steps` must be at least 1, `lr` above 0 and `weight_decay` at least 0, got "
                f"{self.steps}, {self.lr} and {self.weight_decay}"
            )


class NoisyCLIP(nn.Module):
    """The image encoder of a CLIP, to whose class token an embedding of the time is added.

    Args:
        settings: those of a `CLIPVisionConfig`, with the `projection_dim` of the CLIP.
        num_timesteps: how many times there are; embeddings start from 0.
    """

    def __init__(self, settings: dict[str, Any], num_timesteps: int) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        self.settings = settings
        with torch.random.fork_rng(devices=[]):
            self.tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings))
            self.times = nn.Embedding(num_timesteps, self.tower.config.hidden_size)
        nn.init.zeros_(self.times.weight)

    @classmethod
    def of(
        cls,
        clip: Any,
        num_timesteps: int,
        channels: int = 3,
        size: int | None = None,
        seed: int = 0,
    ) -> NoisyCLIP:
        """Return an encoder that starts from that of a `CLIPModel`, with as many patches.

        For images of other `channels` or `size`, such as latents, the patches' embedding starts
        from noise of `seed`. Raises `AttentionError` for a size that the patches do not divide.
        """
        vision = clip.config.vision_config
        side = vision.image_size // vision.patch_size
        size = vision.image_size if size is None else size
        if size % side:
            raise AttentionError(f"`size` must be a multiple of {side} patches, got {size}")
        settings = vision.to_diff_dict() | {
            "num_channels": channels,
            "image_size": size,
            "patch_size": size // side,
            "projection_dim": clip.config.projection_dim,
        }
        model = cls(settings, num_timesteps)
        own, known = model.tower.state_dict(), clip.state_dict()
        for name, value in own.items():
            if known[name].shape == value.shape:
                value.copy_(known[name])
            else:
                value.normal_(
                    std=value[0].numel() ** -0.5, generator=torch.Generator().manual_seed(seed)
                )
        return model.to(clip.device)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        """Return features (n, D) of unit length of x (n, C, H, W) at timesteps (n,)."""
        times = self.times(timesteps)[:, None]

        def with_times(module: nn.Module, arguments: Any, tokens: Tensor) -> Tensor:
            return tokens + pad(times, (0, 0, 0, tokens.shape[1] - 1))

        with self.tower.vision_model.embeddings.register_forward_hook(with_times):
            return unit_features(self.tower(pixel_values=x).image_embeds)

    def save(self, folder: Path) -> None:
        """Write the weights and settings to a folder."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / "model.safetensors")
        settings = {"vision": self.settings, "num_timesteps": self.times.num_embeddings}
        (folder / "config.json").write_text(json.dumps(settings, indent=1))

    @classmethod
    def load(cls, folder: Path) -> NoisyCLIP:
        """Return the encoder of a folder. Raises `AttentionError` for one without its files."""
        from safetensors.torch import load_file

        paths = folder / "config.json", folder / "model.safetensors"
        for path in paths:
            if not path.is_file():
                raise AttentionError(f"{path} is missing; `NoisyCLIP.save(folder)` writes it")
        settings = json.loads(paths[0].read_text())
        model = cls(settings["vision"], settings["num_timesteps"])
        model.load_state_dict(load_file(paths[1]))
        return model.eval()


class NoisyCLIPScorer:
    """Cosines of noisy views and prompts, for `AnagramConfig(score_on="noisy")`.

    Larger images, as of later stages, are averaged to the size that the model knows. That takes
    noise away, so they are scored as at the earlier time of as little noise.

    Args:
        model: the encoder, learned with the noise of `scheduler`.
        clip: the `CLIPModel` whose texts it was learned with.
        tokenizer: that of `clip`.
        scheduler: has the `alphas_cumprod` of the diffusion model.
    """

    def __init__(self, model: NoisyCLIP, clip: Any, tokenizer: Any, scheduler: Any) -> None:
        self.model, self.texts = model.eval(), PromptFeatures(clip, tokenizer)
        self.alphas_cumprod = scheduler.alphas_cumprod

    @torch.no_grad()
    def __call__(self, views: Tensor, t: float, prompts: Sequence[str]) -> Tensor:
        """Return cosines (T, T) of views (T, C, H, W) at time t and prompts.

        Raises `AttentionError` for images whose size is no multiple of the model's.
        """
        size = self.model.tower.config.image_size
        x, time = reduced(views.float(), round(float(t)), size, self.alphas_cumprod)
        seen = self.model(x, torch.full((len(x),), time, device=x.device))
        cosines: Tensor = seen @ self.texts(prompts).to(seen).T
        return cosines


def reduced(x: Tensor, t: int, size: int, alphas_cumprod: Tensor) -> tuple[Tensor, int]:
    """Return noisy images (n, C, H, H) with sides of `size`, and the time that they look like.

    x = s x0 + n epsilon averaged over k x k pixels is s x0 + (n / k) epsilon. Divided by
    sqrt(s^2 + n^2 / k^2) it is an image of the time whose ratio of noise to signal is n / (k s).
    """
    height, width = x.shape[-2:]
    if height != width or height % size:
        raise AttentionError(
            f"noisy images must be square with sides that are multiples of {size}, got "
            f'{height}x{width}; score predicted images instead, `score_on="predicted"`'
        )
    factor = height // size
    if factor == 1:
        return x, t
    share = alphas_cumprod.double()
    angles = torch.atan2((1 - share).sqrt(), share.sqrt())
    signal, noise = share[t] ** 0.5, (1 - share[t]) ** 0.5 / factor
    time = (angles - torch.atan2(noise, signal)).abs().argmin()
    return avg_pool2d(x, factor) / float(torch.hypot(signal, noise)), int(time)


def contrastive_loss(images: Tensor, texts: Tensor, scale: float, same: Tensor) -> Tensor:
    """Return CLIP's loss of features (n, D) of unit length: the mean of both cross-entropies.

    `same` (n, n) says which captions are equal: those share the target evenly.
    """
    logits = scale * images @ texts.T
    targets = same / same.sum(1, keepdim=True)
    return (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2


def train_noisy_clip(
    clip: Any,
    tokenizer: Any,
    scheduler: Any,
    batch_at: BatchAt,
    config: NoisyCLIPConfig = NoisyCLIPConfig(),
) -> NoisyCLIP:
    """Return an image encoder for noisy images, learned from that of a `CLIPModel`.

    Times are drawn evenly, and noise is added by the scheduler. The size and channels of the
    first batch decide what the encoder reads. The same seed and batches give the same weights.

    Raises `AttentionError` when the loss is not finite.
    """
    from rich.console import Console
    from rich.progress import track

    quiet = not Console().is_terminal
    first, _ = batch_at(0)
    count = len(scheduler.alphas_cumprod)
    model = NoisyCLIP.of(clip, count, first.shape[1], first.shape[3], config.seed).train()
    scale = float(clip.logit_scale.detach().exp())
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(config.seed)
    for step in track(range(config.steps), "noise-aware CLIP", disable=quiet):
        images, captions = batch_at(step)
        noise = torch.randn(images.shape, generator=generator).to(images)
        times = torch.randint(count, (len(images),), generator=generator).to(images.device)
        seen = model(scheduler.add_noise(images, noise, times), times)
        names = list(dict.fromkeys(captions))
        which = torch.tensor([names.index(caption) for caption in captions]).to(seen.device)
        texts = text_features(clip, tokenizer, names)[which]
        same = (which[:, None] == which).to(seen)
        loss = contrastive_loss(seen, texts, scale, same)
        if not loss.isfinite():
            raise AttentionError(f"the loss is not finite at step {step}: lower `lr`")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return model.eval().requires_grad_(False)
