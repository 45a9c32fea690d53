"""Builds `data/sprites.json.xz` from the four open emoji sets, as published on npm by Iconify.

Unpack `@iconify-json/noto`, `twemoji`, `openmoji` and `fluent-emoji-flat` into one folder and run
`python -m unweave.emoji_world.build_sprites FOLDER`.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path
from typing import Any

from unweave.emoji_world.world import SPRITES_PATH, World

ICON_SETS = {
    "noto": "noto",
    "twemoji": "twemoji",
    "openmoji": "openmoji",
    "fluent": "fluent-emoji-flat",
}


def read_icon_set(folder: Path) -> dict[str, dict[str, Any]]:
    """Maps a code point such as `"1f431"` to its SVG body and view box size."""
    icons = json.loads((folder / "icons.json").read_text())
    names = json.loads((folder / "chars.json").read_text())
    default = (icons.get("width", 16), icons.get("height", 16))
    sprites = {}
    for codepoint, name in names.items():
        name = icons.get("aliases", {}).get(name, {}).get("parent", name)
        if icon := icons["icons"].get(name):
            size = icon.get("width", default[0]), icon.get("height", default[1])
            sprites[codepoint] = {"body": icon["body"], "width": size[0], "height": size[1]}
    return sprites


def build(root: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Collects concept -> style -> SVG; fails on the first concept that a set lacks."""
    sets = {style: read_icon_set(root / folder) for style, folder in ICON_SETS.items()}
    sprites: dict[str, dict[str, dict[str, Any]]] = {}
    for concept in World.table.values():
        sprites[concept.name] = {}
        for style, icons in sets.items():
            if concept.codepoint not in icons:
                raise KeyError(f"{style} has no icon {concept.codepoint} ({concept.name})")
            sprites[concept.name][style] = icons[concept.codepoint]
    return sprites


def main() -> None:
    """Writes the compressed sprite file into the package."""
    payload = json.dumps(build(Path(sys.argv[1])), separators=(",", ":")).encode()
    SPRITES_PATH.write_bytes(lzma.compress(payload, preset=9))
    print(f"{SPRITES_PATH} {SPRITES_PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
