"""A run told in one HTML file that opens anywhere: what was asked, tables and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from unweave.attention_tools.errors import AttentionError

KINDS = {".png": "image/png", ".gif": "image/gif", ".webp": "image/webp", ".jpg": "image/jpeg"}


@dataclass(frozen=True)
class Table:
    """A table of a report; floats are shown with four digits, and the first cell names its row."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.headers):
                raise AttentionError(
                    f"each row of {self.title!r} needs {len(self.headers)} cells, got {list(row)}"
                )

    @property
    def shown(self) -> list[list[str]]:
        """The cells as text."""
        return [[_text(cell) for cell in row] for row in self.rows]


def write_report(
    path: str | Path,
    title: str,
    *,
    about: Mapping[str, object],
    pictures: Mapping[str, str | Path],
    tables: Sequence[Table] = (),
) -> Path:
    """Write an HTML report and return its path.

    `about` is what was asked, by name; `pictures` are image files by what they show, which go into
    the file, so that it can be moved and sent alone. Nothing is fetched or executed, and all text
    is shown literally. Raises `AttentionError` for pictures that are not there or of a kind that
    browsers do not show.
    """
    from jinja2 import Environment, StrictUndefined

    source = files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(source).render(
        title=title,
        about={name: _text(value) for name, value in about.items()},
        pictures={caption: _data_uri(Path(picture)) for caption, picture in pictures.items()},
        tables=tables,
    )
    target = Path(path)
    partial = target.with_name(f"{target.name}.tmp")
    partial.write_text(page, encoding="utf-8")
    partial.replace(target)
    return target


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_text, value))
    return str(value)


def _data_uri(picture: Path) -> str:
    kind = KINDS.get(picture.suffix.lower())
    if kind is None or not picture.is_file():
        raise AttentionError(
            f"a picture must be a file that ends in one of {', '.join(KINDS)}, got {picture.name!r}"
        )
    return f"data:{kind};base64,{base64.b64encode(picture.read_bytes()).decode()}"
