"""Views of an image for visual anagrams: orthogonal rearrangements, each with its inverse.

A view of noise must be noise again, so views are linear and keep norms: permutations of pixels
and changes of sign (Geng et al. 2024, arXiv 2311.17919). All act on the last three dimensions of
(..., C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from unweave.attention_tools.errors import ViewError

Transform = Callable[[Tensor], Tensor]
"""A function of images (n, C, H, W) to images of the same shape."""

SKEW = 1.5
PATCHES, PIXELS = 8, 64
PERMUTE_SEED = 0
JIGSAW_SEED = 4522
CIRCLE = 3 / 8
PIECES = 4
TOLERANCE = 1e-4


@dataclass(frozen=True)
class View:
    """A view by a function and its inverse, which are checked at construction.

    >>> mirror = View("mirror", lambda x: x.flip(-1), lambda x: x.flip(-1))
    >>> mirror.view(torch.tensor([[[1.0, 2.0]]]))
    tensor([[[2., 1.]]])

    Raises `ViewError` naming the view when the inverse does not undo it, or when it changes the
    shape or the norm of noise or is not linear.
    """

    name: str

    function: Transform = field(repr=False)
    """The view: images (n, C, H, W) in and out."""

    inverse: Transform = field(repr=False)
    """What undoes it."""

    spatial_inverse: Transform | None = field(default=None, repr=False)
    """The inverse for maps (n, 1, H, W), without what happens to colours. By default the absolute
    value of `inverse` of what is above 0, less that of what is below: right for every view that
    moves pixels and changes signs."""

    shape: tuple[int, int, int] = (3, 64, 64)
    """Channels, height and width of the images that it is checked with."""

    def __post_init__(self) -> None:
        self.check(*self.shape)

    def view(self, images: Tensor) -> Tensor:
        """Return the view of images (..., C, H, W)."""
        return self._applied(self.function, images)

    def inverse_view(self, images: Tensor) -> Tensor:
        """Return the images (..., C, H, W) of which `images` are views."""
        return self._applied(self.inverse, images)

    def inverse_map(self, maps: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Return maps (..., h, w) over a view as maps over the image; signs stay as they are.

        `size` is the height and width of the image where that is larger than the maps: they are
        spread over its pixels, moved with them, and averaged again. Differentiable.
        """
        flat, grid = maps.reshape(-1, 1, *maps.shape[-2:]), maps.shape[-2:]
        if size is not None and tuple(size) != tuple(grid):
            flat = interpolate(flat, size, mode="nearest")
        moved = self._spatial(flat)
        if moved.shape[-2:] != grid:
            moved = adaptive_avg_pool2d(moved, (grid[0], grid[1]))
        return moved.reshape(maps.shape)

    def check(self, channels: int, height: int, width: int) -> None:
        """Try the view on noise of a size. Raises `ViewError` when it is no view there."""
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(2, 2, channels, height, width, generator=generator)
        seen, other = self.view(x), self.view(y)
        if not _close(self.inverse_view(seen), x):
            self._fail("its inverse does not undo it", height, width)
        if not _close(self.view(x + 2 * y), seen + 2 * other):
            self._fail("it is not linear", height, width)
        if abs(float(seen.norm() / x.norm()) - 1) > TOLERANCE:
            self._fail("it changes the norm of noise", height, width)
        if (self.inverse_map(x[:, 0].abs()) < 0).any():
            self._fail("its `spatial_inverse` makes maps negative", height, width)

    def _spatial(self, maps: Tensor) -> Tensor:
        if self.spatial_inverse is not None:
            return self._applied(self.spatial_inverse, maps)
        above, below = (self._applied(self.inverse, part).abs() for part in _parts(maps))
        return above - below

    def _applied(self, transform: Transform, images: Tensor) -> Tensor:
        flat = images.reshape(-1, *images.shape[-3:])
        try:
            seen = transform(flat)
        except ViewError:
            raise
        except Exception as error:
            raise ViewError(
                f"the view {self.name!r} failed on images {tuple(flat.shape)}: {error}; a view "
                "takes (n, C, H, W), and maps with one channel unless it has a `spatial_inverse`"
            ) from error
        if seen.shape != flat.shape:
            raise ViewError(
                f"the view {self.name!r} must keep the shape {tuple(flat.shape)}, got "
                f"{tuple(seen.shape)}; rotations need square images"
            )
        return seen.reshape(images.shape)

    def _fail(self, why: str, height: int, width: int) -> None:
        raise ViewError(
            f"the view {self.name!r} cannot be used on {height}x{width} images: {why}; a view must "
            "be a permutation of pixels, a change of signs, or another orthogonal map"
        )


def permutation_view(name: str, index: Callable[[int], Tensor]) -> View:
    """Return a view of square images in which pixel i shows pixel `index(side)[i]`.

    >>> permutation_view("reversed", lambda side: torch.arange(side**2 - 1, -1, -1)).name
    'reversed'
    """

    def function(images: Tensor) -> Tensor:
        return _gathered(images, index(_side(name, images)))

    def inverse(images: Tensor) -> Tensor:
        return _gathered(images, index(_side(name, images)).argsort())

    return View(name, function, inverse)


def skewed(images: Tensor, factor: float) -> Tensor:
    """Return images whose column j is rolled down by the whole part of `factor` j, around.

    >>> skewed(torch.arange(4.0).reshape(1, 1, 2, 2), 1.0)[0, 0]
    tensor([[0., 3.],
            [2., 1.]])
    """
    height, width = images.shape[-2:]
    shifts = (factor * torch.arange(width)).trunc().long()
    rows = (torch.arange(height)[:, None] - shifts) % height
    return images[..., rows.to(images.device), torch.arange(width, device=images.device)]


@cache
def patch_index(side: int, patches: int, name: str = "patch_permute") -> Tensor:
    """Return a permutation of `patches` x `patches` equal squares, the same at every side.

    An image of fewer pixels is permuted by pixels. Raises `ViewError` for a side that the patches
    do not divide.
    """
    patches = min(patches, side)
    if side % patches:
        raise ViewError(
            f"the view {name!r} needs sides that are multiples of {patches}, got {side}"
        )
    generator = torch.Generator().manual_seed(PERMUTE_SEED)
    order = torch.randperm(patches**2, generator=generator)
    squares = _grid(side).unflatten(1, (patches, -1)).unflatten(0, (patches, -1))
    squares = squares.transpose(1, 2).flatten(0, 1)[order]
    index: Tensor = squares.unflatten(0, (patches, patches)).transpose(1, 2).reshape(-1)
    return index


@cache
def circle_index(side: int) -> Tensor:
    """Return the turn of the inner circle, of radius 3/8 of the side, by 180 degrees."""
    grid, away = _grid(side), torch.arange(side) + 0.5 - side / 2
    inside = away[:, None] ** 2 + away**2 < (CIRCLE * side) ** 2
    return torch.where(inside, grid.flip(0, 1), grid).reshape(-1)


@cache
def hinge_index(side: int) -> Tensor:
    """Return the turns of 3 x 3 squares by 90 degrees, neighbours the opposite way.

    Pixels beyond three times a third of the side stay.
    """
    grid, third = _grid(side).clone(), side // 3
    for row in range(3):
        for column in range(3):
            square = (
                slice(row * third, (row + 1) * third),
                slice(column * third, (column + 1) * third),
            )
            grid[square] = grid[square].rot90(1 if (row + column) % 2 else -1)
    return grid.reshape(-1)


@cache
def jigsaw_index(side: int, seed: int = JIGSAW_SEED) -> Tensor:
    """Return the exchange of the pieces of a 4 x 4 jigsaw puzzle, at any side divisible by 4.

    A piece whose row and column add to an even number has tabs to the left and right, the others
    above and below. So corners, inner pieces and two sorts of edges are each of one form up to
    turns, and change places among themselves.
    """
    if side % PIECES:
        raise ViewError(f"the view 'jigsaw' needs sides that are multiples of {PIECES}, got {side}")
    owner, cell = _pieces(side), side // PIECES
    generator = torch.Generator().manual_seed(seed)
    index = torch.empty(side * side, dtype=torch.int64)
    for orbit in _piece_orbits():
        for at, to in enumerate(torch.randperm(4, generator=generator).tolist()):
            rows, columns = (owner == orbit[at]).nonzero().T
            corners = [
                torch.tensor(divmod(piece, PIECES)) * cell for piece in (orbit[at], orbit[to])
            ]
            local = [
                2 * (rows - corners[0][0]) - cell + 1,
                2 * (columns - corners[0][1]) - cell + 1,
            ]
            for _ in range((to - at) % 4):
                local = [-local[1], local[0]]
            new = [
                (away + cell - 1) // 2 + corner
                for away, corner in zip(local, corners[1], strict=True)
            ]
            index[new[0] * side + new[1]] = rows * side + columns
    return index


VIEWS: dict[str, Callable[[], View]] = {
    "identity": lambda: View("identity", _same, _same),
    "flip": lambda: View("flip", partial(torch.flip, dims=(-2,)), partial(torch.flip, dims=(-2,))),
    "rotate_cw": lambda: _rotation("rotate_cw", -1),
    "rotate_ccw": lambda: _rotation("rotate_ccw", 1),
    "rotate_180": lambda: _rotation("rotate_180", 2),
    "negate": lambda: View("negate", torch.neg, torch.neg),
    "skew": lambda: View("skew", partial(skewed, factor=SKEW), partial(skewed, factor=-SKEW)),
    "patch_permute": lambda: permutation_view(
        "patch_permute", partial(patch_index, patches=PATCHES)
    ),
    "pixel_permute": lambda: permutation_view(
        "pixel_permute", partial(patch_index, patches=PIXELS, name="pixel_permute")
    ),
    "jigsaw": lambda: permutation_view("jigsaw", jigsaw_index),
    "inner_circle": lambda: permutation_view("inner_circle", circle_index),
    "square_hinge": lambda: permutation_view("square_hinge", hinge_index),
}
"""The named views; add to it, or give a `View` itself."""


def get_view(view: str | View) -> View:
    """Return a view by its name in `VIEWS`, or the view given. Raises `ViewError` if not known.

    >>> get_view("rotate_cw").view(torch.tensor([[[1, 2], [3, 4]]]))
    tensor([[[3, 1],
             [4, 2]]])
    """
    if isinstance(view, View):
        return view
    if view not in VIEWS:
        raise ViewError(
            f"no view {view!r}; there are {', '.join(VIEWS)}, and `View(name, function, inverse)`"
        )
    return VIEWS[view]()


def _rotation(name: str, quarters: int) -> View:
    return View(
        name,
        partial(torch.rot90, k=quarters, dims=(-2, -1)),
        partial(torch.rot90, k=-quarters, dims=(-2, -1)),
    )


def _same(images: Tensor) -> Tensor:
    return images


def _parts(maps: Tensor) -> tuple[Tensor, Tensor]:
    return maps.clamp_min(0), (-maps).clamp_min(0)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * max(1.0, float(b.abs().max())))


def _gathered(images: Tensor, index: Tensor) -> Tensor:
    return images.flatten(-2)[..., index.to(images.device)].reshape(images.shape)


def _side(name: str, images: Tensor) -> int:
    height, width = images.shape[-2:]
    if height != width:
        raise ViewError(f"the view {name!r} needs square images, got {height}x{width}")
    return int(height)


def _grid(side: int) -> Tensor:
    return torch.arange(side * side).reshape(side, side)


def _pieces(side: int) -> Tensor:
    """Return the number of the piece (side, side) that each pixel belongs to."""
    cell = side // PIECES
    rows, columns = (2 * at + 1 for at in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    owner = (rows // (2 * cell)) * PIECES + columns // (2 * cell)
    for row in range(PIECES):
        for column in range(PIECES):
            steps = ((0, -1), (0, 1)) if (row + column) % 2 == 0 else ((-1, 0), (1, 0))
            for down, right in steps:
                if not (0 <= row + down < PIECES and 0 <= column + right < PIECES):
                    continue
                middle = (2 * row + 1 + down) * cell, (2 * column + 1 + right) * cell
                tab = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < (0.6 * cell) ** 2
                owner[tab] = row * PIECES + column
    return owner


def _piece_orbits() -> list[list[int]]:
    """Return four pieces of one form each, every one a quarter turn ccw of that before it."""
    orbits = []
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 1)):
        orbit = []
        for _ in range(4):
            orbit.append(row * PIECES + column)
            row, column = PIECES - 1 - column, row
        orbits.append(orbit)
    return orbits
