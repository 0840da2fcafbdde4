"""Where tokens lie: against transformers' own packing, and against areas counted pixel by pixel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from edgekit.errors import EdgekitError
from edgekit.passes.visual_tokens.budget import Budget
from edgekit.passes.visual_tokens.geometry import NEWLINE, anyres, image_box, single, tiled

CANVASES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))  # LLaVA-NeXT's
SIZES = (
    (672, 672), (480, 640), (640, 480), (300, 1000), (1000, 300), (336, 336), (100, 100), (2000, 1999), (333, 777),
    (50, 900), (1080, 1920), (37, 41),
)  # fmt: skip


def packed(size, side=24):
    """The order of tokens in which the stock model reads them: its own functions over tokens that are their index."""
    height, width = get_anyres_image_grid_shape(size, [list(canvas) for canvas in CANVASES], 336)
    count = side * side
    tiles = torch.arange(count, count * (1 + height * width)).float()
    plane = tiles.view(height, width, side, side, 1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
    plane = unpad_image(plane, size)[0]
    lines = torch.cat([plane, torch.full((len(plane), 1), float(NEWLINE))], dim=1).flatten()
    return torch.cat([torch.arange(count).float(), lines]).long()


@pytest.mark.parametrize("size", SIZES)
def test_the_sequence_is_that_of_the_stock_model(size):
    geometry = anyres(size, CANVASES, 336, 24)
    assert torch.equal(geometry.sequence, packed(size))
    assert geometry.views == 1 + geometry.tiles[0] * geometry.tiles[1]
    assert torch.equal(geometry.candidates.sort().values, geometry.valid.flatten().nonzero().flatten())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(1, 3000))
def test_random_sizes_are_those_of_the_stock_model(height, width):
    if max(height, width) > 24 * min(height, width):
        return  # the stock model itself keeps no row of such an image
    geometry = anyres((height, width), CANVASES, 336, 24)
    assert torch.equal(geometry.sequence, packed((height, width)))
    for rate in (0.4, 0.2, 0.1, 0.05):
        asked = int(rate * geometry.views * 576 + 1e-9)
        assert Budget(rate=rate).count(geometry) == min(asked, len(geometry.candidates))


@pytest.mark.parametrize("size", SIZES[:6])
def test_a_tile_weighs_the_area_that_it_covers(size):
    """Counted on a fine grid of points of the base view."""
    geometry = anyres(size, CANVASES, 336, 6)
    canvas = 336 * geometry.tiles[0], 336 * geometry.tiles[1]
    top, left, bottom, right = image_box(size, canvas)
    points = 120  # along a side, 20 in each token
    weights = np.zeros((len(geometry.tile_views), 36))
    for y in range(points):
        for x in range(points):
            down, across = top + (y + 0.5) / points * (bottom - top), left + (x + 0.5) / points * (right - left)
            tile = int(down // 336) * geometry.tiles[1] + int(across // 336)
            weights[tile, y * 6 // points * 6 + x * 6 // points] += 36 / points**2
    np.testing.assert_allclose(geometry.tile_weights.numpy(), weights, atol=0.051)
    np.testing.assert_allclose(geometry.tile_weights.sum(0).numpy(), 1.0, atol=1e-9)


def test_one_view_and_resized_tiles_have_no_padding():
    assert single(24, 24).candidates.tolist() == list(range(576))
    geometry = tiled((2, 3), 4, 4)
    assert geometry.views == 7
    assert geometry.base == 6
    assert geometry.valid.all()
    assert geometry.mosaic.shape == (8, 12)
    assert geometry.mosaic[0, :5].tolist() == [0, 1, 2, 3, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 5), CANVASES, 336, 24), "height = 0"),
        (((5, 5), (), 336, 24), "image_grid_pinpoints is empty"),
        (((5, 5), ((300, 300),), 336, 24), "canvas 300x300 is no multiple of the tile's 336 pixels"),
    ],
)
def test_a_bad_geometry_is_refused(arguments, message):
    with pytest.raises(EdgekitError, match=message):
        anyres(*arguments)
