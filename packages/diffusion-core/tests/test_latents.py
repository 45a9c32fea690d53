"""Claims about images and latents: exact where they can be, and named errors elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from unweave.diffusion_core.errors import ImageError
from unweave.diffusion_core.latents import encode_images, load_images

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def _pixels(height: int = 32, width: int = 32) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_every_kind_of_source_gives_the_same_exact_values(tmp_path: Path) -> None:
    pixels = _pixels()
    path = tmp_path / "cat.png"
    Image.fromarray(pixels).save(path)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    sources = [path, str(path), Image.open(path), pixels, tensor, tensor.float() / 255]
    images = load_images(sources, 32)
    expected = tensor.float() / 255 * 2 - 1
    assert images.shape == (6, 3, 32, 32)
    for image in images:
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


def test_one_source_needs_no_list_and_a_batch_counts_as_its_images(tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    Image.fromarray(_pixels()).save(path)
    assert load_images(path, 32).shape == (1, 3, 32, 32)
    assert load_images(Image.open(path), 32).shape == (1, 3, 32, 32)
    assert load_images(torch.zeros(5, 3, 32, 32), 32).shape == (5, 3, 32, 32)


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (20, 33), (1, 1)])
def test_other_sizes_are_cut_to_the_middle_and_resized(size: tuple[int, int]) -> None:
    pixels = _pixels(*size)
    for source in (Image.fromarray(pixels), pixels):
        images = load_images(source, 32)
        assert images.shape == (1, 3, 32, 32)
        assert images.abs().max() <= 1


def test_the_middle_of_a_wide_image_is_kept() -> None:
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 32:64] = 255
    assert load_images([Image.fromarray(pixels), pixels], 32).min() == 1


def test_transparent_parts_lie_on_white() -> None:
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert load_images(image, 32).min() == 1
    assert load_images(Image.new("LA", (32, 32), (0, 255)), 32).max() == -1


def test_images_are_turned_as_their_exif_data_says(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    image = load_images(path, 32)[0]
    assert image[:, :16].max() == -1
    assert image[:, 16:].min() == 1


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"notes\.png"):
        load_images([path], 32)


def test_a_cut_image_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(_pixels()).save(path)
    path.write_bytes(path.read_bytes()[:500])
    for source in (path, tmp_path / "missing.png", tmp_path):
        with pytest.raises(ImageError, match=source.name):
            load_images([source], 32)


@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(32, 32),
        torch.zeros(1, 4, 32, 32),
        torch.full((3, 32, 32), 2.0),
        torch.full((3, 32, 32), float("nan")),
        torch.zeros(3, 32, 32, dtype=torch.int64),
        torch.zeros(3, 0, 32),
        np.zeros((32, 32), dtype=np.uint8),
        np.zeros((32, 32, 3)),
        3,
    ],
)
def test_what_is_no_image_is_refused(source: Any) -> None:
    with pytest.raises(ImageError):
        load_images([source], 32)


def test_no_images_and_no_resolution_are_refused() -> None:
    with pytest.raises(ImageError, match="at least one"):
        load_images([], 32)
    with pytest.raises(ImageError, match="resolution"):
        load_images(torch.zeros(3, 32, 32), 0)


def test_without_a_generator_latents_are_the_scaled_mean(pipe: StableDiffusionPipeline) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = encode_images(pipe.vae, images, None)
        expected = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert latents.shape == (2, 4, 16, 16)
    torch.testing.assert_close(latents, expected)


def test_latents_are_drawn_from_the_generator_alone(pipe: StableDiffusionPipeline) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        first, again, other = (
            encode_images(pipe.vae, images, torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        )
        moment = pipe.vae.encode(images).latent_dist
        noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    expected = (moment.mean + moment.std * noise) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(first, expected)


def test_many_images_are_encoded_like_each_alone(pipe: StableDiffusionPipeline) -> None:
    images = torch.rand(11, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        together = encode_images(pipe.vae, images, None)
        alone = torch.cat([encode_images(pipe.vae, image[None], None) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(3, 32, 32),
        torch.zeros(0, 3, 32, 32),
        torch.full((1, 3, 32, 32), 255.0),
        torch.full((1, 3, 32, 32), float("nan")),
    ],
)
def test_encoding_refuses_other_shapes_and_ranges(
    pipe: StableDiffusionPipeline, images: torch.Tensor
) -> None:
    with pytest.raises(ImageError, match="images"):
        encode_images(pipe.vae, images, None)


@pytest.mark.parametrize("kind", ["tensor", "image"])
def test_without_a_crop_the_whole_image_is_squeezed_into_the_square(kind: str) -> None:
    pixels = torch.zeros(3, 8, 24)
    pixels[:, :, :8] = 1
    source = (
        pixels
        if kind == "tensor"
        else Image.fromarray((pixels.permute(1, 2, 0) * 255).byte().numpy())
    )
    assert load_images(source, 8).max() == -1
    squeezed = load_images(source, 8, center_crop=False)
    assert squeezed.shape == (1, 3, 8, 8) and squeezed[..., 0].min() > 0.9
    assert squeezed[..., 4:].max() < -0.9
