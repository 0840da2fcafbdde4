"""The geometry of an image that a vision tower sees in several views: a base view (the whole image, resized to the size
of the tower's input) and tiles (the image at a higher resolution, on a padded canvas).

A token has a flat index: view * tokens per view + row * columns + column, as the tower writes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from edgekit.errors import EdgekitError

NEWLINE = -1  # in `Geometry.sequence`: a token that ends a row of tiles' tokens, not one of the tower's


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the tokens of an image lie.

    views: images that the tower sees; rows, columns: tokens of each; tiles: rows and columns of tiles, (0, 0) if the
    base view is all there is; base: index of the base view among the views; image: top, left, bottom and right edge of
    the image on the tiles' canvas, in tiles; valid: (views, tokens) bool, False where a token shows padding;
    sequence: (length,) int64, the flat index of each token in the order in which the stock model reads them, with
    NEWLINE where it inserts one; size: height and width of the image in pixels, (0, 0) if the views do not depend on
    them.
    """

    views: int
    rows: int
    columns: int
    tiles: tuple[int, int]
    base: int
    image: tuple[float, float, float, float]
    valid: Tensor
    sequence: Tensor
    size: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens of one view."""
        return self.rows * self.columns

    @cached_property
    def candidates(self) -> Tensor:
        """(candidates,) int64: flat indices that can be kept, in the order in which the language model reads them."""
        return self.sequence[self.sequence != NEWLINE]

    @cached_property
    def tile_views(self) -> list[int]:
        """The indices of the views that are tiles, in raster order."""
        return [view for view in range(self.views) if view != self.base]

    @cached_property
    def order(self) -> Tensor:
        """(views * tokens,) int64: the place of each flat index in the sequence; the sequence's length for padding."""
        places = torch.full((self.views * self.tokens,), len(self.sequence))
        kept = self.sequence != NEWLINE
        places[self.sequence[kept]] = torch.arange(len(self.sequence))[kept]
        return places

    def in_order(self, indices: Tensor) -> Tensor:
        """Return flat indices in the order in which the language model reads them."""
        return indices[torch.argsort(self.order.to(indices.device)[indices])]

    def of_view(self, view: int) -> Tensor:
        """Return the flat indices of a view's candidates, in raster order."""
        return view * self.tokens + self.valid[view].nonzero().flatten()

    @cached_property
    def mosaic(self) -> Tensor:
        """(tile rows * rows, tile columns * columns) int64: flat indices on the whole canvas."""
        return mosaic(self.tiles, self.tile_views, self.rows, self.columns)

    @cached_property
    def image_mosaic(self) -> Tensor:
        """The smallest rectangle of the mosaic that holds every candidate of the tiles; it has no other tokens."""
        inside = self.valid.flatten()[self.mosaic]
        return self.mosaic[inside.any(1)][:, inside.any(0)]

    @cached_property
    def tile_weights(self) -> Tensor:
        """(tiles, tokens) float64: the share of each base token's area that each tile covers.

        The base view is the image without padding, and the tiles cover the padded canvas. So the image's rectangle on
        the canvas, cut at the tiles' edges, is cut again at the base view's tokens. Each column sums to 1."""
        top, left, bottom, right = self.image
        down = _overlaps(self.tiles[0], self.rows, top, bottom)
        across = _overlaps(self.tiles[1], self.columns, left, right)
        return (down[:, None, :, None] * across[None, :, None, :]).reshape(-1, self.tokens)


def single(rows: int, columns: int) -> Geometry:
    """One view of rows x columns tokens, such as LLaVA-1.5's."""
    _positive(rows=rows, columns=columns)
    count = rows * columns
    valid = torch.ones(1, count, dtype=torch.bool)
    return Geometry(1, rows, columns, (0, 0), 0, (0, 0, 0, 0), valid, torch.arange(count))


@lru_cache(maxsize=256)
def anyres(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...], tile: int, side: int) -> Geometry:
    """Return the geometry of LLaVA-NeXT's tiling: a base view, then tiles on the best canvas, rows without padding.

    size: height and width of the image in pixels; pinpoints: allowed canvases, (height, width) each; tile: pixels
    along a tile's side; side: tokens along a tile's side. (Liu et al. 2024, LLaVA-NeXT; the released HiRED swaps height
    and width of the grid.)"""
    _positive(height=size[0], width=size[1], tile=tile, side=side)
    height, width = best_canvas(size, pinpoints)
    if height % tile or width % tile:
        raise EdgekitError(f"canvas {height}x{width} is no multiple of the tile's {tile} pixels; correct the pinpoints")
    tiles = (height // tile, width // tile)
    image = image_box(size, (height, width))
    views, count = 1 + tiles[0] * tiles[1], side * side
    whole = mosaic(tiles, range(1, views), side, side)
    shown = whole[unpadded(size, (tiles[0] * side, tiles[1] * side))]
    valid = torch.zeros(views * count, dtype=torch.bool)
    valid[:count] = True
    valid[shown.flatten()] = True
    lines = torch.cat([shown, torch.full((len(shown), 1), NEWLINE)], dim=1).flatten()
    return Geometry(
        views,
        side,
        side,
        tiles,
        0,
        tuple(edge / tile for edge in image),  # type: ignore[arg-type]
        valid.view(views, count),
        torch.cat([torch.arange(count), lines]),
        size,
    )


def tiled(tiles: tuple[int, int], rows: int, columns: int) -> Geometry:
    """Tiles of an image that was resized to fill the canvas, in raster order, then the base view: Idefics3, InternVL.
    (0, 0) tiles: the base view alone."""
    _positive(rows=rows, columns=columns)
    views, count = tiles[0] * tiles[1] + 1, rows * columns
    valid = torch.ones(views, count, dtype=torch.bool)
    image = (0.0, 0.0, float(tiles[0]), float(tiles[1]))
    return Geometry(views, rows, columns, tiles, views - 1, image, valid, torch.arange(views * count))


def best_canvas(size: tuple[int, int], pinpoints: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the canvas (height, width) that shows most of the image's pixels; of equals, the one that wastes least."""
    if not pinpoints:
        raise EdgekitError("no canvas is allowed: image_grid_pinpoints is empty; use a model with at least one")

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)


def image_box(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return top, left, bottom and right edge of the image on its canvas, in pixels: resized to fit, then centred."""
    scale = [canvas[0] / size[0], canvas[1] / size[1]]
    if scale[1] < scale[0]:
        height, width = min(math.ceil(size[0] * scale[1]), canvas[0]), canvas[1]
    else:
        height, width = canvas[0], min(math.ceil(size[1] * scale[0]), canvas[1])
    top, left = (canvas[0] - height) // 2, (canvas[1] - width) // 2
    return top, left, top + height, left + width


def unpadded(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[slice, slice]:
    """Return the rows and columns of a canvas of tokens that the stock model keeps of an image: as many are cut at one
    edge as at the other."""
    if size[1] / size[0] > canvas[1] / canvas[0]:
        cut = (canvas[0] - int(round(size[0] * (canvas[1] / size[1]), 7))) // 2
        return slice(cut, canvas[0] - cut), slice(0, canvas[1])
    cut = (canvas[1] - int(round(size[1] * (canvas[0] / size[0]), 7))) // 2
    return slice(0, canvas[0]), slice(cut, canvas[1] - cut)


def mosaic(tiles: tuple[int, int], views: Sequence[int], rows: int, columns: int) -> Tensor:
    """Return flat indices, (tile rows * rows, tile columns * columns), of tiles side by side in raster order."""
    first = torch.tensor(list(views)).view(*tiles, 1, 1) * (rows * columns)
    inside = torch.arange(rows * columns).view(1, 1, rows, columns)
    return (first + inside).permute(0, 2, 1, 3).reshape(tiles[0] * rows, tiles[1] * columns)


def _overlaps(tiles: int, cells: int, start: float, end: float) -> Tensor:
    """Return (tiles, cells): the share of each cell between start and end that lies in each tile of length 1."""
    edges = start + (end - start) * torch.arange(cells + 1, dtype=torch.float64) / cells
    tile = torch.arange(tiles, dtype=torch.float64)[:, None]
    covered = torch.minimum(edges[1:], tile + 1) - torch.maximum(edges[:-1], tile)
    return covered.clamp(min=0) * (cells / (end - start))


def _positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise EdgekitError(f"{name} = {value} of an image's geometry; expected at least 1")
