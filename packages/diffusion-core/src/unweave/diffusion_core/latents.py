"""Images from files, PIL or arrays as tensors of one size, and their latents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from unweave.diffusion_core.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image

ImageSource: TypeAlias = "str | Path | Image | Tensor | np.ndarray[Any, Any]"

_ENCODE_BATCH = 8


def load_images(
    sources: ImageSource | Iterable[ImageSource], resolution: int, *, center_crop: bool = True
) -> Tensor:
    """Return square images (n, 3, resolution, resolution) in [-1, 1], float32 on the CPU.

    A source is a file, a PIL image, a uint8 array (H, W, 3), or a tensor (3, H, W) or (n, 3, H, W)
    that is uint8 or floating with values in [0, 1]. Images are turned as their EXIF data says,
    laid on white where they are transparent, cut to the middle square and resized (bicubic); those
    of the right size keep their exact values. Without `center_crop` the whole image is squeezed
    into the square. Raises `ImageError` naming the source that is no image.
    """
    if resolution < 1:
        raise ImageError(f"`resolution` must be at least 1, got {resolution}")
    single = isinstance(sources, (str, Path, Tensor, np.ndarray)) or hasattr(sources, "convert")
    batches = [
        _load(source, resolution, center_crop)
        for source in ([sources] if single else sources)  # type: ignore[union-attr]
    ]
    if not sum(map(len, batches)):
        raise ImageError("`sources` holds no images: give at least one")
    return torch.cat(batches) * 2 - 1


def encode_images(vae: nn.Module, images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return scaled latents (n, C, h, w) drawn from the posterior of `images` (n, 3, H, W).

    `images` are in [-1, 1]. The draw comes from `generator`, wherever the model is; without a
    generator the latents are the posterior's mean. Raises `ImageError` for another shape or range.
    """
    autoencoder: Any = vae
    _check_images(images)
    moments = [
        autoencoder.encode(part.to(autoencoder.device, autoencoder.dtype)).latent_dist
        for part in torch.split(images, _ENCODE_BATCH)
    ]
    latents = torch.cat([moment.mean for moment in moments])
    if generator is not None:
        noise = torch.randn(latents.shape, generator=generator, device=generator.device)
        latents = latents + torch.cat([moment.std for moment in moments]) * noise.to(latents)
    shift = getattr(autoencoder.config, "shift_factor", None) or 0.0
    return (latents - shift) * float(autoencoder.config.scaling_factor)


def _load(source: Any, resolution: int, center_crop: bool) -> Tensor:
    """Return one source as images (n, 3, resolution, resolution) in [0, 1]."""
    if isinstance(source, Tensor):
        return _resize_tensor(_as_batch(source), resolution, center_crop)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise ImageError(f"an array must be uint8 (H, W, 3), got {source.dtype} {source.shape}")
        return _resize_tensor(
            _as_batch(torch.tensor(source).permute(2, 0, 1)), resolution, center_crop
        )
    if isinstance(source, (str, Path)):
        return _open(Path(source), resolution, center_crop)
    if hasattr(source, "convert"):
        return _from_pil(source, resolution, center_crop)
    raise ImageError(f"expected a path, PIL image, array or tensor, got {type(source).__name__}")


def _open(path: Path, resolution: int, center_crop: bool) -> Tensor:
    from PIL import Image

    if path.is_dir():
        raise ImageError(f"{str(path)!r} is a folder: give its image files one by one")
    try:
        with Image.open(path) as image:
            return _from_pil(image, resolution, center_crop)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"cannot read {str(path)!r} as an image: {error}; give a PNG, JPEG or WebP file"
        ) from error


def _from_pil(image: Image, resolution: int, center_crop: bool) -> Tensor:
    from PIL import Image as images
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        image = images.alpha_composite(images.new("RGBA", image.size, "white"), colours)
    image = image.convert("RGB")
    size = (resolution, resolution)
    if image.size != size:
        bicubic = images.Resampling.BICUBIC
        image = ImageOps.fit(image, size, bicubic) if center_crop else image.resize(size, bicubic)
    return _as_batch(torch.tensor(np.asarray(image)).permute(2, 0, 1))


def _as_batch(tensor: Tensor) -> Tensor:
    batch = tensor[None] if tensor.ndim == 3 else tensor
    if batch.ndim != 4 or batch.shape[1] != 3 or 0 in batch.shape[2:]:
        raise ImageError(
            f"an image tensor must be (3, H, W) or (n, 3, H, W), got {tuple(tensor.shape)}"
        )
    batch = batch.detach().cpu()
    if batch.dtype == torch.uint8:
        return batch.float() / 255
    if not batch.is_floating_point():
        raise ImageError(f"an image tensor must be uint8 or floating, got {batch.dtype}")
    if batch.numel() and not (0 <= float(batch.min()) <= float(batch.max()) <= 1):
        raise ImageError(
            f"a floating image tensor must have values in [0, 1], got {float(batch.min()):g} to "
            f"{float(batch.max()):g}"
        )
    return batch.float()


def _resize_tensor(batch: Tensor, resolution: int, center_crop: bool) -> Tensor:
    height, width = batch.shape[-2:]
    if center_crop:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        batch = batch[..., top : top + side, left : left + side]
    if batch.shape[-2:] == (resolution, resolution):
        return batch
    resized = nn.functional.interpolate(
        batch, (resolution, resolution), mode="bicubic", antialias=True
    )
    return resized.clamp(0, 1)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ImageError(f"`images` must be (n, 3, H, W), got {tuple(images.shape)}")
    low, high = float(images.min()), float(images.max())
    if not -1.001 <= low <= high <= 1.001:
        raise ImageError(f"`images` must have values in [-1, 1], got {low:g} to {high:g}")
