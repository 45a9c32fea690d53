"""Super-resolution of visual anagrams: later stages of pixel models, seen through the same views.

Stage II of DeepFloyd IF (64 to 256 pixels) and the x4 upscaler of Stable Diffusion, as the code
of Anagram-MTL (arXiv 2412.02693) chains them after stage I.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unweave.attention_tools.anagram import Anagram, AnagramConfig
from unweave.attention_tools.errors import AttentionError
from unweave.attention_tools.multiview import (
    AnyScorer,
    Condition,
    MultiViewDenoiser,
    decoded,
    device_of,
    drawn_noise,
    encoded,
    require,
    seeds_of,
)

UPSCALING = AnagramConfig(anti_segregation=False)
"""The settings of the paper's code after the first stage."""


class AnagramUpscaler:
    """Makes an anagram larger with a super-resolution pipeline of diffusers.

    Each view shows the model both x and the smaller image, [x | image], to which noise of a level
    that the model is told was added. Noises of views are mixed as in the first stage; maps are
    not drawn over one another, which belongs to the first stage alone.

    Args:
        pipe: `IFSuperResolutionPipeline`, of whose U-Net's size the images become, or
            `StableDiffusionUpscalePipeline`, which makes them four times as large.
        config: the settings; those of anti-segregation are not used.
        scorer: rates views for balancing, such as a `CLIPScorer`.
        text_from: the pipeline that encodes prompts, such as that of the first stage, where `pipe`
            was loaded without its text encoder.

    Raises `AttentionError` for balancing without a scorer, or for a pipeline of another kind.

    ```python
    small = AnagramMTL(stage_1, scorer=scorer)(prompts, views, generator=generator)
    large = AnagramUpscaler(stage_2, scorer=scorer, text_from=stage_1)(small)
    final = AnagramUpscaler(stage_3, AVERAGING)(large, tasks=[0], noise_level=0)
    ```
    """

    def __init__(
        self,
        pipe: Any,
        config: AnagramConfig = UPSCALING,
        *,
        scorer: AnyScorer | None = None,
        text_from: Any | None = None,
    ) -> None:
        require(pipe, config, scorer)
        noising = getattr(pipe, "image_noising_scheduler", getattr(pipe, "low_res_scheduler", None))
        if noising is None:
            raise AttentionError(
                f"{type(pipe).__name__} has no `image_noising_scheduler` or `low_res_scheduler`: "
                "larger anagrams need a pipeline such as IFSuperResolutionPipeline"
            )
        self.pipe, self.config, self.scorer = pipe, config, scorer
        self.noising, self.text_from = noising, pipe if text_from is None else text_from
        if getattr(self.text_from, "text_encoder", None) is None:
            raise AttentionError(
                f"{type(self.text_from).__name__} has no text encoder: give the pipeline of the "
                "first stage as `text_from`"
            )

    @torch.no_grad()
    def __call__(
        self,
        anagram: Anagram,
        *,
        tasks: Sequence[int] | None = None,
        noise_level: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 30,
        guidance_scale: float = 10.0,
    ) -> Anagram:
        """Return the anagram's images, larger, with the same views.

        Args:
            anagram: what an earlier stage made.
            tasks: which of its prompts and views take part; by default all. The paper's code runs
                the x4 upscaler with the first alone, `[0]`, and noise level 0.
            noise_level: step of the noising scheduler to which noise is added to the smaller image.
            generator: one, or a list with one for each image.
            num_inference_steps: steps of the scheduler.
            guidance_scale: as in the pipeline; 1 and less is without guidance.

        Raises `AttentionError` for tasks that the anagram lacks, a noise level beyond the noising
        scheduler, or images not smaller than those of the model, `ViewError` for a view that does
        not fit the size, and `GuidanceError` when x is not finite.
        """
        pipe, every = self.pipe, range(len(anagram.views))
        chosen = list(every) if tasks is None else list(tasks)
        if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(every):
            raise AttentionError(
                f"`tasks` must be different numbers below {len(every)}, the number of the "
                f"anagram's views, got {tasks}"
            )
        steps_of_noise = self.noising.config.num_train_timesteps
        if not 0 <= noise_level < steps_of_noise:
            raise AttentionError(
                f"`noise_level` must be from 0 to {steps_of_noise - 1}, got {noise_level}"
            )
        prompts = [anagram.record["prompts"][task] for task in chosen]
        views = tuple(anagram.views[task] for task in chosen)
        pipe.scheduler.set_timesteps(num_inference_steps, device=device_of(pipe))
        x, condition = self._start(2 * anagram.pixels - 1, noise_level, generator)
        for view in views:
            view.check(*x.shape[1:])
        guidance = guidance_scale if guidance_scale > 1 else None
        text = encoded(self.text_from, prompts, guidance is not None).to(x)
        denoiser = MultiViewDenoiser(
            pipe, self.config, self.scorer, views, prompts, text, guidance, condition
        )
        x, steps = denoiser(x, generator)
        record = anagram.record | {
            "config": asdict(replace(self.config, anti_segregation=False)),
            "seeds": seeds_of(generator),
            "steps": steps,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "tasks": chosen,
            "noise_level": noise_level,
            "smaller": anagram.record,
        }
        return Anagram.of(decoded(pipe, x), anagram.views, record)

    def _start(self, image: Tensor, noise_level: int, generator: Any) -> tuple[Tensor, Condition]:
        """Return noise x and the condition, drawn in the order of the pipeline of diffusers."""
        pipe, unet = self.pipe, self.pipe.unet
        image = image.to(device_of(pipe), unet.dtype)
        count, channels = image.shape[:2]
        own = unet.config.in_channels - channels
        levels = torch.full((count,), noise_level, device=image.device)
        if getattr(pipe, "vae", None) is not None:
            noised = self._noised(image, levels, generator)
            x = self._noise(
                (count, unet.config.in_channels - channels, *image.shape[2:]), generator
            )
            return x, Condition(noised, levels)
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if image.shape[2] >= height or image.shape[3] >= width:
            raise AttentionError(
                f"images {tuple(image.shape[2:])} must be smaller than those of the model, "
                f"{(height, width)}"
            )
        x = self._noise((count, own, height, width), generator)
        large = interpolate(image, (height, width), mode="bilinear", align_corners=True)
        return x, Condition(self._noised(large, levels, generator), levels)

    def _noise(self, shape: tuple[int, ...], generator: Any) -> Tensor:
        noise = drawn_noise(self.pipe, shape, generator)
        return torch.as_tensor(noise * self.pipe.scheduler.init_noise_sigma)

    def _noised(self, image: Tensor, levels: Tensor, generator: Any) -> Tensor:
        noise = drawn_noise(self.pipe, tuple(image.shape), generator)
        return torch.as_tensor(self.noising.add_noise(image, noise, levels))
