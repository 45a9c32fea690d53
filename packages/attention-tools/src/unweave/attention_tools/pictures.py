"""Pictures of attention maps: over an image, and as a grid of tokens by layers or steps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unweave.attention_tools.errors import MapError
from unweave.attention_tools.maps import AttentionMaps
from unweave.attention_tools.masks import rescaled

if TYPE_CHECKING:
    from PIL.Image import Image

HEAT = ("#000004", "#280b54", "#65156e", "#9f2a63", "#d44842", "#f57d15", "#fac127", "#fcffa4")
"""Dark to bright: evenly spaced colours of "inferno", with which lightness grows by the value."""

GAP = 6


def colour(values: Tensor) -> Tensor:
    """Return the heat colours (..., 3) in [0, 1] of values in [0, 1].

    >>> colour(torch.tensor([0.0, 1.0]))[1].mul(255).round()
    tensor([252., 255., 164.])
    """
    table = torch.tensor([[int(one[at : at + 2], 16) for at in (1, 3, 5)] for one in HEAT]) / 255
    place = values.detach().float().cpu().clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp_max(len(HEAT) - 2)
    return torch.lerp(table[low], table[low + 1], (place - low)[..., None])


def overlay(image: Any, attention: Tensor, *, opacity: float = 0.6) -> Image:
    """Return `image` with a map (h, w) of any size over it: bright where the map is high.

    The map is rescaled to [0, 1] and enlarged smoothly to the image, a PIL image, an array
    (H, W, 3) or a tensor (3, H, W) in [0, 1]. Raises `MapError` for another shape of map or image,
    and for an opacity outside [0, 1].
    """
    from PIL import Image

    if not 0 <= opacity <= 1:
        raise MapError(f"`opacity` must be from 0 to 1, got {opacity}")
    if attention.dim() != 2:
        raise MapError(f"`attention` must be one map (h, w), got {tuple(attention.shape)}")
    picture = _picture(image)
    ground = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    ground = ground.reshape(picture.height, picture.width, 3)
    maps = rescaled(attention.detach().float().cpu())[None, None]
    size = (picture.height, picture.width)
    heat = interpolate(maps, size, mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    mixed = torch.lerp(ground, colour(heat), opacity)
    return Image.fromarray(mixed.mul(255).round().byte().numpy())


def grid(
    maps: AttentionMaps,
    image: Any = None,
    *,
    by: Literal["layer", "step"] | None = None,
    sample: int = 0,
    size: int = 128,
) -> Image:
    """Return a picture with one column a token, and one row, or one a layer or step.

    Maps lie over `image` where it is given, which comes first in each row. Each map is rescaled on
    its own, and says its largest value. `size` is the side of a cell in pixels. Raises `MapError`
    when nothing was recorded, and for a sample that is not there.
    """
    from PIL import Image, ImageDraw, ImageFont

    rows = _rows(maps, by)
    first = rows[0][1]
    if not -first.shape[0] <= sample < first.shape[0]:
        raise MapError(f"`sample` must be below {first.shape[0]}, got {sample}")
    names = list(maps.names or map(str, range(first.shape[1])))
    picture = None if image is None else _picture(image)
    font = ImageFont.load_default(size=12)
    line = 16
    left = max((int(font.getlength(label)) for label, _ in rows), default=0)
    left += 2 * GAP if left else GAP
    columns = len(names) + (picture is not None)
    height = line + GAP + len(rows) * (size + line + GAP)
    sheet = Image.new("RGB", (left + columns * (size + GAP), height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(([""] if picture is not None else []) + names):
        draw.text(
            (left + column * (size + GAP), GAP // 2), _fitting(name, font, size), "black", font
        )
    for row, (label, values) in enumerate(rows):
        top = line + GAP + row * (size + line + GAP)
        draw.text((GAP, top + size // 2 - line // 2), label, "black", font)
        cells = [] if picture is None else [(picture.resize((size, size)), "")]
        for own in values[sample].detach().float().cpu():
            cells.append((_cell(own, picture, size), f"max {float(own.max()):.3g}"))
        for column, (cell, note) in enumerate(cells):
            at = left + column * (size + GAP)
            sheet.paste(cell, (at, top))
            draw.text((at, top + size), note, "#666666", font)
    return sheet


def _rows(maps: AttentionMaps, by: str | None) -> list[tuple[str, Tensor]]:
    """Return labels and maps (B, tokens, h, w)."""
    if by not in (None, "layer", "step"):
        raise MapError(f'`by` must be "layer", "step" or None, got {by!r}')
    if by is None or not maps.values:
        return [("", maps.aggregate())]
    if by == "step":
        grid = max(maps.grids.values(), key=lambda size: size[0] * size[1])
        return [
            ("all steps" if step < 0 else f"step {step}", maps.select(step=step).aggregate(grid))
            for step in maps.steps
        ]
    return [
        (_short(name, maps.grids[name]), maps.select(layer=name.__eq__).aggregate())
        for name in maps.layers
    ]


def _short(layer: str, grid: tuple[int, int]) -> str:
    """Return "up 1.0.0 8x8" for "up_blocks.1.attentions.0.transformer_blocks.0.attn2"."""
    place = layer.split(".")[0].removesuffix("_blocks").removesuffix("_block")
    return f"{place} {'.'.join(re.findall(r'(?<=[.])[0-9]+', layer))} {grid[0]}x{grid[1]}"


def _cell(values: Tensor, picture: Image | None, size: int) -> Image:
    from PIL import Image

    if picture is not None:
        return overlay(picture.resize((size, size)), values)
    flat = colour(rescaled(values)).mul(255).round().byte().numpy()
    return Image.fromarray(flat).resize((size, size), Image.Resampling.NEAREST)


def _picture(image: Any) -> Image:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    values = torch.as_tensor(image).detach().cpu()
    if values.dim() == 3 and values.shape[0] == 3 and values.shape[2] != 3:
        values = values.permute(1, 2, 0)
    if values.dim() != 3 or values.shape[2] != 3:
        raise MapError(
            f"`image` must be a PIL image, or (H, W, 3) or (3, H, W), got {tuple(values.shape)}"
        )
    if values.is_floating_point():
        values = values.clamp(0, 1).mul(255).round()
    return Image.fromarray(values.byte().contiguous().numpy())


def _fitting(text: str, font: Any, width: int) -> str:
    """Return the text, cut to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
