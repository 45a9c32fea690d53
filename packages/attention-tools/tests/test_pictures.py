"""Pictures: sizes, colours, and where the heat is."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from unweave.attention_tools import AttentionMaps
from unweave.attention_tools.errors import MapError
from unweave.attention_tools.pictures import animate_maps, colour, grid, overlay


def pixels(image):
    flat = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return flat.reshape(image.height, image.width, 3).float()


@pytest.fixture
def maps():
    recorded = AttentionMaps(names=("cat", "a very long phrase of the prompt"), each_step=True)
    values = torch.rand(2, 16, 2, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        recorded.add("up_blocks.1.attentions.0.transformer_blocks.0.attn2", step, values, (4, 4))
        recorded.add(
            "mid_block.attentions.0.transformer_blocks.0.attn2", step, values[:, :4], (2, 2)
        )
    return recorded


def test_colours_grow_brighter_with_the_value():
    luminance = colour(torch.linspace(0, 1, 101)) @ torch.tensor([0.299, 0.587, 0.114])
    assert (luminance.diff() > 0).all()
    assert colour(torch.tensor([2.0])).equal(colour(torch.tensor([1.0])))


def test_overlay_is_bright_where_the_map_is_high():
    attention = torch.zeros(4, 4)
    attention[0, 3] = 0.01
    picture = pixels(overlay(Image.new("RGB", (64, 48), "#808080"), attention))
    assert picture.shape == (48, 64, 3)
    brightest = picture.sum(-1).argmax().item()
    row, column = divmod(brightest, 64)
    assert row < 12 and column >= 48
    assert picture[:12, 48:].mean() > picture[24:, :32].mean() + 50


def test_overlay_without_opacity_is_the_image():
    image = torch.rand(3, 8, 10, generator=torch.Generator().manual_seed(0))
    shown = pixels(overlay(image, torch.rand(2, 2), opacity=0.0))
    assert torch.allclose(shown, image.permute(1, 2, 0) * 255, atol=0.51)


def test_images_of_all_kinds_are_the_same_picture():
    array = (torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(1)) * 255).byte()
    attention = torch.eye(8)
    first = pixels(overlay(Image.fromarray(array.numpy()), attention))
    for image in (array.numpy(), array.permute(2, 0, 1).float() / 255):
        assert pixels(overlay(image, attention)).equal(first)


def test_grid_has_a_column_a_token_and_a_row_a_layer_or_step(maps):
    image = Image.new("RGB", (64, 64), "#3366cc")
    plain, layers = grid(maps, size=64), grid(maps, by="layer", size=64)
    steps, with_image = grid(maps, by="step", size=64), grid(maps, image, size=64)
    assert (plain.width - 6) % (64 + 6) == 0
    assert steps.height - layers.height == layers.height - plain.height > 64
    assert with_image.width - plain.width == 64 + 6
    assert layers.width > plain.width


def test_grid_without_an_image_shows_the_raw_places(maps):
    cell = pixels(grid(maps, size=64))[22 : 22 + 64, 6 : 6 + 64]
    at = maps.select(token="cat").aggregate()[0, 0].argmax().item()
    row, column = divmod(at, 4)
    brightest = cell[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
    assert brightest.flatten(0, 1).unique(dim=0).tolist() == [[252, 255, 164]]


def test_methods_of_maps_are_the_same_pictures(maps):
    image = Image.new("RGB", (32, 32), "white")
    assert pixels(maps.grid(image, by="step")).equal(pixels(grid(maps, image, by="step")))
    own = maps.select(token="cat").aggregate()[1, 0]
    assert pixels(maps.overlay(image, "cat", sample=1)).equal(pixels(overlay(image, own)))


@pytest.fixture
def growing():
    """Maps of twelve steps whose one bright place grows, and moves along the first row."""
    recorded = AttentionMaps(names=("cat",), each_step=True)
    for step in range(12):
        values = torch.zeros(1, 16, 1)
        values[0, step // 3] = (step + 1) / 12
        recorded.add("up_blocks.0.attn2", step, values, (4, 4))
    return recorded


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animation_has_a_frame_a_step_whose_colours_mean_the_same(growing, tmp_path, suffix):
    path = animate_maps(growing, tmp_path / f"steps{suffix}", size=64, seconds=0.1)
    with Image.open(path) as moving:
        assert moving.n_frames == 12 and moving.info["loop"] == 0
        frames, times = [], []
        for at in range(12):
            moving.seek(at)
            frames.append(pixels(moving.copy()))
            times.append(moving.info["duration"])
    if suffix != ".webp":  # Pillow gives the end of a frame of WebP, not how long it lasts.
        assert times == [100] * 11 + [400]
    left = frames[0].shape[1] - 64 - 6
    cells = [frame[22 : 22 + 64, left : left + 64].mean(-1) for frame in frames]
    for step, cell in enumerate(cells):
        assert cell.argmax().item() % 64 // 16 == step // 3
    brightest = torch.stack([cell.max() for cell in cells])
    assert (brightest.diff() > 0).all() and brightest[0] < 60


def test_an_animation_lies_over_the_image(growing, tmp_path):
    image = Image.new("RGB", (32, 32), "#3366cc")
    with Image.open(growing.animate(tmp_path / "steps.gif", image)) as moving:
        frame = pixels(moving.copy())
    left = frame.shape[1] - 2 * (128 + 6)
    assert (frame[40:140, left + 10 : left + 120] - torch.tensor([51.0, 102, 204])).abs().max() < 8


def test_what_cannot_move_is_named(growing, maps, tmp_path):
    for wrong, match in (
        ((growing, tmp_path / "steps.jpg"), "end in one of"),
        ((growing.select(step=0), tmp_path / "steps.gif"), "two steps"),
        ((AttentionMaps(), tmp_path / "steps.gif"), "no maps"),
    ):
        with pytest.raises(MapError, match=match):
            animate_maps(*wrong)
    with pytest.raises(MapError, match="seconds"):
        animate_maps(growing, tmp_path / "steps.gif", seconds=0)
    with pytest.raises(MapError, match="sample"):
        animate_maps(maps, tmp_path / "steps.gif", sample=2)
    assert not list(tmp_path.iterdir())


def test_bad_input_is_named(maps):
    image = Image.new("RGB", (8, 8))
    with pytest.raises(MapError, match="opacity"):
        overlay(image, torch.rand(2, 2), opacity=1.5)
    with pytest.raises(MapError, match="one map"):
        overlay(image, torch.rand(1, 2, 2))
    with pytest.raises(MapError, match="image"):
        overlay(torch.rand(4, 8, 8), torch.rand(2, 2))
    with pytest.raises(MapError, match="sample"):
        grid(maps, sample=2)
    with pytest.raises(MapError, match="layers"):
        grid(maps, by="layers")
    with pytest.raises(MapError, match="no maps"):
        grid(AttentionMaps())
    with pytest.raises(MapError, match="finite"):
        overlay(image, torch.tensor([[float("nan"), 0.0]]))
