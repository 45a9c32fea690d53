"""The embedded world's vocabulary: concepts, styles, backgrounds, and their vector art."""

from __future__ import annotations

import csv
import difflib
import json
import lzma
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data"
SPRITES_PATH = DATA / "sprites.json.xz"
SPRITE_PIXELS = 96

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (20, 20, 24),
    "gray": (140, 140, 145),
    "red": (205, 50, 50),
    "green": (60, 150, 70),
    "blue": (55, 90, 200),
    "purple": (130, 70, 170),
    "pink": (245, 170, 195),
}


@dataclass(frozen=True)
class Concept:
    """One nameable thing; `split` is `core`, `more` or `held-out`."""

    name: str
    codepoint: str
    category: str
    split: str
    synonyms: tuple[str, ...]


class _World:
    """Table of contents of the world; use the ready instance `World`."""

    styles: tuple[str, ...] = ("noto", "twemoji", "openmoji", "fluent")
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)

    @cached_property
    def table(self) -> dict[str, Concept]:
        """Every concept by name, the held-out ones included."""
        with (Path(__file__).parent / "concepts.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {
            row["name"]: Concept(
                row["name"],
                row["codepoint"],
                row["category"],
                row["split"],
                tuple(filter(None, row["synonyms"].split("|"))),
            )
            for row in rows
        }

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the concepts that models may be trained on."""
        return self._names("core", "more")

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the concepts that the diffusion recipe trains on."""
        return self._names("core")

    @property
    def held_out(self) -> tuple[str, ...]:
        """Names that no recipe trains on, for personalization."""
        return self._names("held-out")

    def find(self, name: str) -> Concept:
        """Looks a concept up by name or synonym.

        Raises:
            KeyError: with the closest names when there is no such concept.
        """
        for concept in self.table.values():
            if name == concept.name or name in concept.synonyms:
                return concept
        close = difflib.get_close_matches(name, self.table, n=3, cutoff=0.4)
        hint = ", ".join(close) or ", ".join(list(self.table)[:5])
        raise KeyError(f"no concept {name!r} in emoji-world; did you mean one of: {hint}?")

    @staticmethod
    def phrase(name: str) -> str:
        """The name with its article, as captions have it: "a cat face", "an octopus"."""
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"

    def _names(self, *splits: str) -> tuple[str, ...]:
        return tuple(c.name for c in self.table.values() if c.split in splits)


World = _World()


@cache
def _sprites() -> dict[str, dict[str, dict[str, Any]]]:
    loaded: dict[str, dict[str, dict[str, Any]]] = json.loads(
        lzma.decompress(SPRITES_PATH.read_bytes())
    )
    return loaded


@cache
def sprite(concept: str, style: str, pixels: int = SPRITE_PIXELS) -> NDArray[np.uint8]:
    """Renders one drawing as RGBA `(pixels, pixels, 4)`, cropped to its ink and centred."""
    import io

    import resvg_py
    from PIL import Image

    icon = _sprites()[concept][style]
    width, height = icon["width"], icon["height"]
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{2 * pixels}" height="{2 * pixels}">{icon["body"]}</svg>'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * pixels, height=2 * pixels))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").getbbox()
    ink = image.crop(box) if box else image
    ink.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (pixels, pixels))
    square.paste(ink, ((pixels - ink.width) // 2, (pixels - ink.height) // 2))
    return np.asarray(square)
