"""One-file HTML reports: text, tables, numbers and images that open anywhere, offline."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from unweave.diffusion_core.errors import ImageError, UnweaveError
from unweave.diffusion_core.files import atomic_write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

Cell: TypeAlias = "str | int | float | bool | None"
"""What a table shows: floats get four significant digits, `None` a dash."""

_GAP = 2


class Report:
    """A report that grows block by block and is saved as a folder.

    Every `add_*` method returns the report, so that calls can be chained. Text, labels and cells
    are shown literally: markup in them is escaped.

    Example:
        >>> report = Report("Cats").add_text("Two runs.").add_numbers({"rate": 0.25})
        >>> report.add_table(["run", "loss"], [["first", 0.5], ["second", 0.25]]).numbers
        {'rate': 0.25}
    """

    def __init__(self, title: str) -> None:
        """Start an empty report; `title` heads the page."""
        self.title = title
        self.numbers: dict[str, Any] = {}
        self._blocks: list[_Text | _Table | _Images] = []

    def add_text(self, text: str) -> Report:
        """Add paragraphs; an empty line starts a new one."""
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        self._blocks.append(_Text(paragraphs))
        return self

    def add_table(
        self, headers: Sequence[str], rows: Sequence[Sequence[Cell]], *, title: str = ""
    ) -> Report:
        """Add a table; every row needs one cell per header, and the first cell names the row."""
        for row in rows:
            if len(row) != len(headers):
                raise UnweaveError(
                    f"every row needs {len(headers)} cells, one per header, "
                    f"got {len(row)} in {list(row)!r}"
                )
        self._blocks.append(_Table.of(title, list(headers), rows))
        return self

    def add_images(self, title: str, images: Tensor, labels: Sequence[str] = ()) -> Report:
        """Add images (n, 3, H, W) in [0, 1] in a row, each with its label (none or n of them)."""
        images = _checked_images(images)
        if labels and len(labels) != len(images):
            raise UnweaveError(
                f"`labels` must be empty or one per image, got {len(labels)} labels "
                f"for {len(images)} images"
            )
        self._blocks.append(_Images(title, images, tuple(labels) or ("",) * len(images)))
        return self

    def add_numbers(self, numbers: Mapping[str, Any]) -> Report:
        """Add results for `numbers.json`, shown as a table too; values are finite or `None`.

        Nested mappings are allowed and shown with dotted names. A name given before is replaced.
        """
        try:
            plain = json.loads(json.dumps(dict(numbers), allow_nan=False, default=_plain))
        except (TypeError, ValueError) as error:
            raise UnweaveError(
                "`numbers` must hold finite numbers, text, `None`, lists or mappings, "
                f"got {dict(numbers)!r} ({error}); use `None` for what is undefined"
            ) from error
        self.numbers.update(plain)
        self._blocks.append(_Table.of("Numbers", ["name", "value"], list(_flat(plain))))
        return self

    def save(self, folder: str | Path) -> Path:
        """Write `report.html`, `numbers.json` and, with images, `grid.png`; return the HTML path.

        The HTML is self-contained: images are PNG data URIs and nothing is fetched or executed.
        Each file is replaced as a whole, and a `grid.png` of an earlier report without a
        successor is removed.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        grid = self._grid()
        if grid is None:
            (folder / "grid.png").unlink(missing_ok=True)
        else:
            atomic_write_bytes(folder / "grid.png", _png_bytes(grid))
        numbers = json.dumps(self.numbers, indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_bytes(folder / "numbers.json", (numbers + "\n").encode())
        path = folder / "report.html"
        atomic_write_bytes(path, self._html().encode())
        return path

    def _html(self) -> str:
        from jinja2 import Environment, StrictUndefined

        source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(source).render(
            title=self.title, blocks=[block.context() for block in self._blocks]
        )

    def _grid(self) -> Image | None:
        """Return all image blocks below each other, each a grid of its own."""
        from PIL import Image

        grids = [
            image_grid(block.images, columns=min(len(block.images), 8))
            for block in self._blocks
            if isinstance(block, _Images)
        ]
        if not grids:
            return None
        size = (max(grid.width for grid in grids), sum(grid.height for grid in grids))
        sheet = Image.new("RGB", size, "white")
        top = 0
        for grid in grids:
            sheet.paste(grid, (0, top))
            top += grid.height
        return sheet


def image_grid(images: Tensor, columns: int, scale: int = 2) -> Image:
    """Lay images (n, 3, H, W) in [0, 1] out in rows of `columns`, each pixel `scale` wide.

    The images stand on white, two pixels apart. Raises `ImageError` for another shape, for
    values that are not finite and for no images at all.
    """
    from PIL import Image

    images = _checked_images(images)
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise UnweaveError(f"`{name}` must be at least 1, got {value}")
    height, width = (side * scale for side in images.shape[2:])
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + _GAP) + _GAP, rows * (height + _GAP) + _GAP)
    grid = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        tile = _to_pil(image).resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, (_GAP + column * (width + _GAP), _GAP + row * (height + _GAP)))
    return grid


@dataclass(frozen=True)
class _Text:
    paragraphs: list[str]

    def context(self) -> dict[str, Any]:
        return {"kind": "text", "paragraphs": self.paragraphs}


@dataclass(frozen=True)
class _Table:
    title: str
    headers: list[str]
    rows: list[list[str]]
    numeric: list[bool]
    """Whether a column holds numbers only and is set flush right."""

    @classmethod
    def of(cls, title: str, headers: list[str], rows: Sequence[Sequence[Cell]]) -> _Table:
        numeric = [
            bool(rows) and all(_is_number(row[column]) for row in rows)
            for column in range(len(headers))
        ]
        return cls(title, headers, [[_shown(cell) for cell in row] for row in rows], numeric)

    def context(self) -> dict[str, Any]:
        return {"kind": "table", **vars(self)}


@dataclass(frozen=True)
class _Images:
    title: str
    images: Tensor
    labels: tuple[str, ...]

    def context(self) -> dict[str, Any]:
        height, width = self.images.shape[2:]
        return {
            "kind": "images",
            "title": self.title,
            "images": [
                {"uri": _data_uri(image), "label": label, "width": width, "height": height}
                for image, label in zip(self.images, self.labels, strict=True)
            ],
        }


def _checked_images(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ImageError(
            f"images must be a (n, 3, H, W) tensor with n >= 1, got {tuple(images.shape)}"
        )
    images = images.detach().float().cpu()
    if not torch.isfinite(images).all():
        raise ImageError("images must be finite and in [0, 1], got NaN or infinity among them")
    return images.clamp(0, 1)


def _to_pil(image: Tensor) -> Image:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    return Image.fromarray(pixels.numpy())


def _png_bytes(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _data_uri(image: Tensor) -> str:
    return "data:image/png;base64," + base64.b64encode(_png_bytes(_to_pil(image))).decode()


def _is_number(cell: Cell) -> bool:
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))


def _shown(cell: Cell) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _plain(value: object) -> Any:
    """Turn what JSON does not know, such as a tensor of one element, into a plain value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Cell]]:
    rows: list[tuple[str, Cell]] = []
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(_shown(item) for item in value)))
        else:
            rows.append((prefix + name, value))
    return rows
