"""Composes scenes from sprites: an image with its caption, exact masks, boxes and factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from unweave.emoji_world.world import BACKGROUNDS, World, sprite

if TYPE_CHECKING:
    from PIL.Image import Image

VISIBLE_ALPHA = 12
TEXTURES = ("plain", "stripes", "dots")
CAPTION_TEMPLATES = (
    "{objects} on a {background} background, {style} style",
    "{objects}, {style} style, {background} background",
    "{style} style picture of {objects} on {background}",
    "{objects} on a {background} background",
    "{objects}, {style} style",
    "{objects}",
)
FACTOR_NAMES = ("concept", "style", "x", "y", "size", "background")


@dataclass(frozen=True)
class SceneObject:
    """One drawing: `center` and `size` are fractions of the image side."""

    concept: str
    style: str = "noto"
    center: tuple[float, float] = (0.5, 0.5)
    size: float = 0.7

    def __post_init__(self) -> None:
        if self.concept not in World.table:
            object.__setattr__(self, "concept", World.find(self.concept).name)
        if self.style not in World.styles:
            raise ValueError(f"`style` must be one of {World.styles}, got {self.style!r}")
        if not 0 < self.size <= 1:
            raise ValueError(f"`size` must be in (0, 1], got {self.size}")


@dataclass(frozen=True)
class Overlay:
    """Something laid over the scene: a watermark or caption text, or a QR code of `text`."""

    kind: Literal["watermark", "qr", "caption"]
    text: str = "sample"


@dataclass(frozen=True)
class SceneSpec:
    """Everything that determines a scene; later objects cover earlier ones."""

    objects: tuple[SceneObject, ...]
    background: str = "white"
    texture: str = "plain"
    overlay: Overlay | None = None
    template: int = 0

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(
                f"`background` must be one of {World.backgrounds}, got {self.background!r}"
            )
        if self.texture not in TEXTURES:
            raise ValueError(f"`texture` must be one of {TEXTURES}, got {self.texture!r}")
        if not 0 <= self.template < len(CAPTION_TEMPLATES):
            raise ValueError(
                f"`template` must be in [0, {len(CAPTION_TEMPLATES)}), got {self.template}"
            )


@dataclass(frozen=True)
class Scene:
    """A rendered scene.

    `image` is uint8 `(H, W, 3)`; `masks` is bool `(objects, H, W)` and holds visible pixels only;
    `boxes` is int `(objects, 4)` as `x0, y0, x1, y1` (all zero when hidden); `factors` is float
    `(objects, 6)` in the order of `FACTOR_NAMES`, with indices for the categorical ones.
    """

    spec: SceneSpec
    image: NDArray[np.uint8]
    caption: str
    masks: NDArray[np.bool_]
    boxes: NDArray[np.int64]
    factors: NDArray[np.float32]


def compose(spec: SceneSpec, resolution: int = 64) -> Scene:
    """Renders `spec` at `resolution` x `resolution` pixels; the same spec gives the same pixels."""
    from PIL import Image

    canvas = Image.fromarray(_background(spec.background, spec.texture, resolution))
    masks = np.zeros((len(spec.objects), resolution, resolution), dtype=bool)
    for index, item in enumerate(spec.objects):
        drawing = _scaled_sprite(item.concept, item.style, max(2, round(item.size * resolution)))
        x, y = (round(c * resolution - drawing.width / 2) for c in item.center)
        canvas.paste(drawing, (x, y), drawing)
        stencil = Image.new("L", canvas.size)
        stencil.paste(drawing.getchannel("A"), (x, y))
        masks[index] = np.asarray(stencil) > VISIBLE_ALPHA
        masks[:index] &= ~masks[index]
    if spec.overlay:
        _draw_overlay(canvas, spec.overlay)
    boxes = np.stack([_box(mask) for mask in masks]) if len(masks) else np.zeros((0, 4), np.int64)
    return Scene(spec, np.asarray(canvas), caption(spec), masks, boxes, factors_of(spec))


def caption(spec: SceneSpec) -> str:
    """Words for a scene, as a person would type them into the pipeline."""
    names = [World.phrase(item.concept) for item in spec.objects] or ["nothing"]
    styles = dict.fromkeys(item.style for item in spec.objects)
    texture = "" if spec.texture == "plain" else f" {spec.texture}"
    return CAPTION_TEMPLATES[spec.template].format(
        objects=" and ".join(names),
        background=spec.background + texture,
        style=" and ".join(styles) or World.styles[0],
    )


def factors_of(spec: SceneSpec) -> NDArray[np.float32]:
    """The factor vector of each object, `(objects, 6)` in the order of `FACTOR_NAMES`."""
    names = list(World.table)
    background = World.backgrounds.index(spec.background)
    rows = [
        (names.index(o.concept), World.styles.index(o.style), *o.center, o.size, background)
        for o in spec.objects
    ]
    return np.asarray(rows, dtype=np.float32).reshape(-1, len(FACTOR_NAMES))


def random_spec(
    rng: np.random.Generator,
    *,
    concepts: tuple[str, ...] | None = None,
    counts: tuple[float, ...] = (0.0, 0.65, 0.35),
    texture_rate: float = 0.0,
) -> SceneSpec:
    """Draws a spec; `counts[n]` is the probability of n objects, which share one style."""
    concepts = concepts or World.concepts
    number = int(rng.choice(len(counts), p=counts))
    style = str(rng.choice(World.styles))
    chosen = rng.choice(len(concepts), size=number, replace=False)
    objects = []
    for slot, index in enumerate(chosen):
        size = rng.uniform(0.6, 0.85) if number < 2 else rng.uniform(0.4, 0.5)
        x = (
            rng.uniform(0.4, 0.6)
            if number < 2
            else (slot + 0.5) / number + rng.uniform(-0.04, 0.04)
        )
        y = rng.uniform(0.4, 0.6) if number < 2 else rng.uniform(0.35, 0.65)
        objects.append(SceneObject(concepts[index], style, (float(x), float(y)), float(size)))
    textured = rng.random() < texture_rate
    return SceneSpec(
        tuple(objects),
        background=str(rng.choice(World.backgrounds)),
        texture=str(rng.choice(TEXTURES[1:])) if textured else "plain",
        template=int(rng.choice(len(CAPTION_TEMPLATES), p=(0.3, 0.2, 0.1, 0.15, 0.1, 0.15))),
    )


class SceneDataset:
    """A map-style torch data set of `length` scenes, each a pure function of `(seed, index)`.

    `keep` filters specs (co-occurrence, held-out pairs); a rejected spec is redrawn from the same
    stream. Items are dicts with `image` (float32 `(3, H, W)` in [0, 1]), `caption` and `scene`.

    Raises:
        ValueError: when `keep` rejects a thousand draws in a row.
    """

    def __init__(
        self,
        length: int,
        *,
        seed: int = 0,
        resolution: int = 64,
        concepts: tuple[str, ...] | None = None,
        counts: tuple[float, ...] = (0.0, 0.65, 0.35),
        texture_rate: float = 0.0,
        keep: Callable[[SceneSpec], bool] | None = None,
    ) -> None:
        self.length, self.seed, self.resolution = length, seed, resolution
        self.concepts, self.counts, self.texture_rate = concepts, counts, texture_rate
        self.keep = keep

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, object]:
        import torch

        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is outside a data set of {self.length} scenes")
        scene = self.scene(index)
        image = torch.from_numpy(scene.image.copy()).permute(2, 0, 1).float() / 255
        return {"image": image, "caption": scene.caption, "scene": scene}

    def scene(self, index: int) -> Scene:
        """The scene at `index`, without torch."""
        rng = np.random.default_rng((self.seed, index))
        for _ in range(1000):
            spec = random_spec(
                rng, concepts=self.concepts, counts=self.counts, texture_rate=self.texture_rate
            )
            if self.keep is None or self.keep(spec):
                return compose(spec, self.resolution)
        raise ValueError("`keep` rejected 1000 scenes in a row: loosen the filter")


def crossed_specs(**levels: tuple[object, ...]) -> list[SceneSpec]:
    """Every combination of the given factor levels, for disentanglement metrics.

    Keys are `FACTOR_NAMES`; a factor left out stays at one level.

    Raises:
        ValueError: for a key that is no factor.
    """
    from itertools import product

    if unknown := set(levels) - set(FACTOR_NAMES):
        raise ValueError(f"factors must be among {FACTOR_NAMES}, got {sorted(unknown)}")
    defaults: dict[str, tuple[object, ...]] = {
        "concept": World.trained[:1],
        "style": World.styles[:1],
        "x": (0.5,),
        "y": (0.5,),
        "size": (0.6,),
        "background": World.backgrounds[:1],
    }
    grid = product(*(defaults | levels).values())
    return [
        SceneSpec(
            (SceneObject(str(c), str(s), (float(str(x)), float(str(y))), float(str(size))),),
            background=str(background),
        )
        for c, s, x, y, size, background in grid
    ]


@lru_cache(maxsize=4096)
def _scaled_sprite(concept: str, style: str, pixels: int) -> Image:
    from PIL import Image

    drawing = Image.fromarray(sprite(concept, style))
    return drawing.resize((pixels, pixels), Image.Resampling.LANCZOS)


@lru_cache(maxsize=256)
def _background(name: str, texture: str, resolution: int) -> NDArray[np.uint8]:
    colour = np.asarray(BACKGROUNDS[name], dtype=np.float32)
    y, x = np.mgrid[:resolution, :resolution] / resolution
    if texture == "stripes":
        pattern = (np.floor((x + y) * 8) % 2).astype(bool)
    elif texture == "dots":
        pattern = ((x * 8 % 1 - 0.5) ** 2 + (y * 8 % 1 - 0.5) ** 2) < 0.06
    else:
        pattern = np.zeros_like(x, dtype=bool)
    accent = colour + np.where(colour.mean() > 128, -35, 45)
    pixels = np.where(pattern[..., None], accent, colour)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _draw_overlay(canvas: Image, overlay: Overlay) -> None:
    from PIL import Image, ImageDraw, ImageFont

    side = canvas.width
    if overlay.kind == "qr":
        import segno

        modules = np.asarray([list(row) for row in segno.make(overlay.text, micro=False).matrix])
        code = Image.fromarray(np.where(modules > 0, 0, 255).astype(np.uint8))
        edge = max(code.width, side // 3)
        canvas.paste(
            code.resize((edge, edge), Image.Resampling.NEAREST), (side - edge, side - edge)
        )
        return
    font = ImageFont.load_default(max(8, side // 6))
    draw = ImageDraw.Draw(canvas, "RGBA")
    anchor, place = (
        ("mm", (side / 2, side / 2))
        if overlay.kind == "watermark"
        else ("mb", (side / 2, side - 1))
    )
    opacity = 150 if overlay.kind == "watermark" else 255
    draw.text(
        place,
        overlay.text,
        font=font,
        anchor=anchor,
        fill=(255, 255, 255, opacity),
        stroke_width=1,
        stroke_fill=(0, 0, 0, opacity),
    )


def _box(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    if not mask.any():
        return np.zeros(4, dtype=np.int64)
    ys, xs = np.nonzero(mask)
    return np.asarray([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], dtype=np.int64)
