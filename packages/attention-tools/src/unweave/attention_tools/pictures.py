"""Pictures of attention maps: over an image, in a grid by layers or steps, and moving."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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

OPACITY = 0.6
GAP, LINE = 6, 16
"""Pixels between cells, and of a line of text."""

MOVING = (".gif", ".webp", ".png")
"""What an animation can be written as."""


def colour(values: Tensor) -> Tensor:
    """Return the heat colours (..., 3) in [0, 1] of values in [0, 1].

    >>> colour(torch.tensor([0.0, 1.0]))[1].mul(255).round()
    tensor([252., 255., 164.])
    """
    table = torch.tensor([[int(one[at : at + 2], 16) for at in (1, 3, 5)] for one in HEAT]) / 255
    place = values.detach().float().cpu().clamp(0, 1) * (len(HEAT) - 1)
    low = place.floor().long().clamp_max(len(HEAT) - 2)
    return torch.lerp(table[low], table[low + 1], (place - low)[..., None])


def overlay(image: Any, attention: Tensor, *, opacity: float = OPACITY) -> Image:
    """Return `image` with a map (h, w) of any size over it: bright where the map is high.

    The map is rescaled to [0, 1] and enlarged smoothly to the image, a PIL image, an array
    (H, W, 3) or a tensor (3, H, W) in [0, 1]. Raises `MapError` for another shape of map or image,
    and for an opacity outside [0, 1].
    """
    if not 0 <= opacity <= 1:
        raise MapError(f"`opacity` must be from 0 to 1, got {opacity}")
    if attention.dim() != 2:
        raise MapError(f"`attention` must be one map (h, w), got {tuple(attention.shape)}")
    return _over(_picture(image), rescaled(attention.detach().float().cpu()), opacity)


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
    rows = _rows(maps, by)
    names = _names(maps, rows[0][1], sample)
    picture = None if image is None else _picture(image)
    chosen = [_Row(label, own, rescaled(own)) for label, own in _of_sample(rows, sample)]
    return _sheet(names, chosen, picture, size, _margin(rows))


def animate_maps(
    maps: AttentionMaps,
    path: str | Path,
    image: Any = None,
    *,
    sample: int = 0,
    size: int = 128,
    seconds: float = 0.25,
) -> Path:
    """Write maps over the denoising steps as a moving picture: a frame a step, a column a token.

    Record with `each_step=True`. Colours of a token mean the same in all frames: from the least to
    the largest value of its map over all steps. Maps lie over `image` where it is given. A frame
    lasts `seconds`, the last one four times as long; then it begins again. The format follows the
    suffix: `.gif`, `.webp` or an animated `.png`.

    Raises `MapError` for another suffix, maps of a single step, or a sample that is not there.
    """
    target = Path(path)
    if target.suffix.lower() not in MOVING:
        raise MapError(f"`path` must end in one of {', '.join(MOVING)}, got {target.name!r}")
    if seconds <= 0:
        raise MapError(f"`seconds` must be above 0, got {seconds}")
    rows = _rows(maps, "step")
    if len(rows) < 2:
        raise MapError(
            f"an animation needs maps of two steps, got steps {maps.steps}: record with "
            "`each_step=True`"
        )
    names = _names(maps, rows[0][1], sample)
    chosen = _of_sample(rows, sample)
    values = torch.stack([own for _, own in chosen], 1)
    scaled = rescaled(values.flatten(2)).view_as(values)
    picture = None if image is None else _picture(image)
    frames = [
        _sheet(names, [_Row(label, own, scaled[:, at])], picture, size, _margin(rows))
        for at, (label, own) in enumerate(chosen)
    ]
    times = [round(1000 * seconds)] * len(frames)
    times[-1] *= 4
    settings: dict[str, Any] = {"lossless": True} if target.suffix.lower() == ".webp" else {}
    frames[0].save(
        target, save_all=True, append_images=frames[1:], duration=times, loop=0, **settings
    )
    return target


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


def _names(maps: AttentionMaps, values: Tensor, sample: int) -> list[str]:
    """Return what the tokens are called, after a check that the sample is there."""
    if not -values.shape[0] <= sample < values.shape[0]:
        raise MapError(f"`sample` must be below {values.shape[0]}, got {sample}")
    return list(maps.names or map(str, range(values.shape[1])))


def _of_sample(rows: Sequence[tuple[str, Tensor]], sample: int) -> list[tuple[str, Tensor]]:
    return [(label, values[sample].detach().float().cpu()) for label, values in rows]


@dataclass(frozen=True)
class _Row:
    label: str
    values: Tensor
    """Maps (tokens, h, w)."""

    shown: Tensor
    """The same moved and scaled to [0, 1]."""


def _margin(rows: Sequence[tuple[str, Tensor]]) -> int:
    """Return how wide the labels of rows are."""
    widest = max(int(_font().getlength(label)) for label, _ in rows)
    return widest + 2 * GAP if widest else GAP


def _font() -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size=12)


def _sheet(
    names: Sequence[str], rows: Sequence[_Row], picture: Image | None, size: int, left: int
) -> Image:
    """Return rows of maps with names above, labels on the left and the largest value below each."""
    from PIL import Image, ImageDraw

    font, shown = _font(), 0 if picture is None else 1
    width = left + (len(names) + shown) * (size + GAP)
    sheet = Image.new("RGB", (width, LINE + GAP + len(rows) * (size + LINE + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(names, shown):
        at = (left + column * (size + GAP), GAP // 2)
        draw.text(at, _fitting(name, font, size), "black", font)
    for index, row in enumerate(rows):
        top = LINE + GAP + index * (size + LINE + GAP)
        draw.text((GAP, top + size // 2 - LINE // 2), row.label, "black", font)
        if picture is not None:
            sheet.paste(picture.resize((size, size)), (left, top))
        for column, (values, heat) in enumerate(zip(row.values, row.shown, strict=True), shown):
            at = (left + column * (size + GAP), top)
            sheet.paste(_cell(heat, picture, size), at)
            draw.text((at[0], top + size), f"max {float(values.max()):.3g}", "#666666", font)
    return sheet


def _cell(values: Tensor, picture: Image | None, size: int) -> Image:
    from PIL import Image

    if picture is not None:
        return _over(picture.resize((size, size)), values, OPACITY)
    flat = colour(values).mul(255).round().byte().numpy()
    return Image.fromarray(flat).resize((size, size), Image.Resampling.NEAREST)


def _over(picture: Image, values: Tensor, opacity: float) -> Image:
    """Return a picture with the heat of values (h, w) in [0, 1] over it."""
    from PIL import Image

    ground = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() / 255
    ground = ground.reshape(picture.height, picture.width, 3)
    size = (picture.height, picture.width)
    heat = interpolate(values[None, None], size, mode="bicubic", align_corners=False)[0, 0]
    mixed = torch.lerp(ground, colour(heat), opacity)
    return Image.fromarray(mixed.mul(255).round().byte().numpy())


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
