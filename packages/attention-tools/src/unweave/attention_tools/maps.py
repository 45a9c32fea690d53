"""Recorded attention maps: chosen, averaged, enlarged and stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from unweave.attention_tools.errors import MapError

if TYPE_CHECKING:
    from PIL.Image import Image

    from unweave.attention_tools.masks import Method

Key = tuple[str, int]
"""A layer and a step; the step is -1 in a mean over steps."""


@dataclass
class AttentionMaps:
    """Maps of tokens by layer and step: probabilities, averaged over heads.

    >>> maps = AttentionMaps(names=("cat", "dog"))
    >>> maps.add("up", 0, torch.rand(1, 16, 2), (4, 4))
    >>> maps.select(token="dog").aggregate(resolution=8).shape
    torch.Size([1, 1, 8, 8])
    """

    names: tuple[str, ...] | None = None
    """What the maps are of, in order: words, or positions as text; None is every token."""

    each_step: bool = False
    """Whether steps are apart; else each layer holds its mean over steps."""

    values: dict[Key, Tensor] = field(default_factory=dict, repr=False)
    """Maps (B, h * w, tokens) by layer and step."""

    grids: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    """Height and width by layer."""

    counts: dict[Key, int] = field(default_factory=dict, repr=False)
    """How many passes each mean is over."""

    def add(self, layer: str, step: int, values: Tensor, grid: tuple[int, int]) -> None:
        """Add maps (B, h * w, tokens) of one pass, in float32 or float64."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        key = (layer, step if self.each_step else -1)
        count = self.counts.get(key, 0)
        if count:
            before = self.values[key]
            if before.shape != values.shape:
                raise MapError(
                    f"{layer} gave maps {tuple(values.shape)} after {tuple(before.shape)}: record "
                    "prompts or sizes that differ in blocks of their own"
                )
            values = before + (values - before) / (count + 1)
        self.values[key], self.counts[key], self.grids[layer] = values, count + 1, grid

    @property
    def nbytes(self) -> int:
        """Bytes that the maps take."""
        return sum(values.nbytes for values in self.values.values())

    @property
    def layers(self) -> list[str]:
        """Names of the layers, in the order of the forward pass."""
        return list(dict.fromkeys(layer for layer, _ in self.values))

    @property
    def steps(self) -> list[int]:
        """The recorded steps; [-1] where they are averaged."""
        return sorted({step for _, step in self.values})

    def select(
        self,
        *,
        token: str | int | Sequence[str | int] | None = None,
        layer: str | Callable[[str], bool] | None = None,
        step: int | Sequence[int] | None = None,
        resolution: int | tuple[int, int] | None = None,
    ) -> AttentionMaps:
        """Return the maps of some tokens, layers, steps or grids alone.

        `token` is a name, a place among the recorded tokens, or several; `layer` a part of a path,
        as "up_blocks", or a function of it. Raises `MapError` when nothing is left.
        """
        grid = (resolution, resolution) if isinstance(resolution, int) else resolution
        steps = [step] if isinstance(step, int) else step
        fits = layer if callable(layer) else (lambda name: layer is None or layer in name)
        keys = [
            key
            for key in self.values
            if fits(key[0])
            and (steps is None or key[1] in steps)
            and (grid is None or self.grids[key[0]] == grid)
        ]
        if not keys:
            raise MapError(
                f"no maps of layer {layer!r}, step {step}, resolution {resolution}: there are "
                f"layers {self.layers}, steps {self.steps} and grids "
                f"{sorted(set(self.grids.values()))}"
            )
        at, names = self._places(token)
        return replace(
            self,
            names=names,
            values={
                key: self.values[key] if at is None else self.values[key][..., at] for key in keys
            },
            grids={name: self.grids[name] for name, _ in keys},
            counts={key: self.counts[key] for key in keys},
        )

    def aggregate(self, resolution: int | tuple[int, int] | None = None) -> Tensor:
        """Return the mean over layers and steps (B, tokens, h, w), each layer counting once a step.

        Maps of different grids are enlarged bilinearly to `resolution`, by default the largest.
        Differentiable where the maps are. Raises `MapError` when nothing was recorded.
        """
        if not self.values:
            raise MapError(
                "no maps were recorded: run the pipeline inside the `capture_attention` block, at "
                "a `resolution` and `steps` that occur"
            )
        grid = (resolution, resolution) if isinstance(resolution, int) else resolution
        grid = (
            max(self.grids.values(), key=lambda size: size[0] * size[1]) if grid is None else grid
        )
        total: Tensor | None = None
        for (layer, _), values in self.values.items():
            maps = values.transpose(1, 2).unflatten(2, self.grids[layer])
            if maps.shape[-2:] != grid:
                maps = interpolate(maps, grid, mode="bilinear", align_corners=False)
            total = maps if total is None else total + maps
        assert total is not None
        return total / len(self.values)

    def to_mask(
        self,
        method: Method = "otsu",
        threshold: float | None = None,
        resolution: int | tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the boolean mask of each token (B, tokens, h, w): `aggregate`, then `to_mask`."""
        from unweave.attention_tools.masks import to_mask

        return to_mask(self.aggregate(resolution), method, threshold)

    def overlay(self, image: Any, token: str | int = 0, *, sample: int = 0) -> Image:
        """Return `image` with the aggregate map of one token over it."""
        from unweave.attention_tools.pictures import overlay

        return overlay(image, self.select(token=token).aggregate()[sample, 0])

    def grid(
        self, image: Any = None, *, by: Literal["layer", "step"] | None = None, sample: int = 0
    ) -> Image:
        """Return a picture with one column a token, and one row, or one a layer or step."""
        from unweave.attention_tools.pictures import grid

        return grid(self, image, by=by, sample=sample)

    def animate(self, path: str | Path, image: Any = None, *, sample: int = 0) -> Path:
        """Write the maps of each step as a moving picture: `animate_maps`."""
        from unweave.attention_tools.pictures import animate_maps

        return animate_maps(self, path, image, sample=sample)

    def save(self, path: str | Path) -> Path:
        """Write everything to a compressed `.npz`, which `AttentionMaps.load` and numpy read."""
        import numpy as np

        keys = list(self.values)
        about = {
            "names": self.names,
            "each_step": self.each_step,
            "layers": [layer for layer, _ in keys],
            "steps": [step for _, step in keys],
            "counts": [self.counts[key] for key in keys],
            "grids": self.grids,
        }
        arrays: dict[str, Any] = {
            f"maps_{at}": self.values[key].detach().cpu().numpy() for at, key in enumerate(keys)
        }
        target = Path(path)
        target = target.with_name(f"{target.name.removesuffix('.npz')}.npz")
        partial = target.with_suffix(".tmp.npz")
        np.savez_compressed(partial, about=np.array(json.dumps(about)), **arrays)
        partial.replace(target)
        return target

    @staticmethod
    def load(path: str | Path) -> AttentionMaps:
        """Read what `save` wrote. Raises `MapError` for a file that is none of its."""
        import zipfile
        import zlib

        import numpy as np

        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                keys = list(zip(about["layers"], about["steps"], strict=True))
                values = {
                    key: torch.from_numpy(stored[f"maps_{at}"]) for at, key in enumerate(keys)
                }
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            ValueError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise MapError(f"{path} holds no attention maps: {error}") from error
        return AttentionMaps(
            names=None if about["names"] is None else tuple(about["names"]),
            each_step=about["each_step"],
            values=values,
            grids={name: (size[0], size[1]) for name, size in about["grids"].items()},
            counts=dict(zip(keys, about["counts"], strict=True)),
        )

    def _places(
        self, token: str | int | Sequence[str | int] | None
    ) -> tuple[list[int] | None, tuple[str, ...] | None]:
        if token is None:
            return None, self.names
        wanted = [token] if isinstance(token, (str, int)) else list(token)
        count = next(iter(self.values.values())).shape[-1]
        known = list(self.names) if self.names else [str(place) for place in range(count)]
        places = [known.index(one) if one in known else one for one in wanted]
        for one in places:
            if not isinstance(one, int) or not -count <= one < count:
                raise MapError(f"{one!r} is not among the recorded tokens {known}")
        at = [int(place) % count for place in places]
        return at, tuple(known[place] for place in at)
