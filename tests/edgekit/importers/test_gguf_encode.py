"""Encoding blocks: the bytes of ggml's rule, and the grids on which other methods round."""

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers.gguf_encode import ENCODINGS, Grid, nearest, pack
from edgekit.importers.gguf_formats import FORMATS, NUMBERS


def values(seed=0, rows=40, inputs=96):
    """Rows of different sizes, with zeros, a constant block, one that float16 stores as 0, and values on the edge
    between two codes."""
    rng = np.random.default_rng(seed)
    found = (rng.normal(size=(rows, inputs)) * np.geomspace(1e-6, 1e3, rows)[:, None]).astype(np.float32)
    found[3] = 0
    found[4, :32] = 0.25
    found[5] = np.float32(1e-12) * rng.normal(size=inputs)
    found[6] = np.resize(np.arange(-8, 8) + 0.5, inputs)
    return found


@pytest.mark.parametrize("form", ENCODINGS)
@pytest.mark.parametrize("seed", range(5))
def test_the_bytes_are_those_of_the_package_of_the_formats_authors(form, seed):
    package = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    given = values(seed)
    with np.errstate(over="ignore"):
        expected = package.quantize(given, package.GGMLQuantizationType(NUMBERS[form]))
    found = nearest(form, given)
    assert np.array_equal(found, expected)
    given[-1, 0] *= -1
    assert not np.array_equal(nearest(form, given), expected)


@pytest.mark.parametrize("form", ENCODINGS)
def test_a_packed_grid_decodes_to_its_values(form):
    blocks = np.random.default_rng(1).normal(size=(20, 2, 32))
    grids = [Grid.fit(form, blocks[:, at], np.ones(32)) for at in range(2)]
    codes = np.stack([grid.codes(blocks[:, at]) for at, grid in enumerate(grids)], axis=1)
    scale, least = (np.stack([getattr(grid, part) for grid in grids], axis=1) for part in ("scale", "least"))
    decoded = FORMATS[NUMBERS[form]].decode(pack(form, scale, least, codes))
    expected = np.concatenate([grid.values(codes[:, at]) for at, grid in enumerate(grids)], axis=1)
    assert np.allclose(decoded, expected, rtol=1e-6, atol=1e-6)
    codes[0, 0, 0] ^= 1
    assert not np.allclose(FORMATS[NUMBERS[form]].decode(pack(form, scale, least, codes)), expected, rtol=1e-3)


@pytest.mark.parametrize("form", ENCODINGS)
def test_a_fitted_grid_is_better_where_it_matters(form):
    rng = np.random.default_rng(2)
    block, importance = rng.standard_t(3, size=(200, 32)), rng.uniform(0, 1, 32) ** 4

    def error(found):
        return ((found - block) ** 2 @ importance).sum()

    grid = Grid.fit(form, block, importance)
    plain = FORMATS[NUMBERS[form]].decode(nearest(form, block.astype(np.float32)))
    share = error(grid.values(grid.codes(block))) / error(plain)
    assert share < (1.001 if form == "Q8_0" else 0.9)  # in 8 bits there is little to gain
    other = Grid.fit(form, block, importance[::-1])
    assert error(other.values(other.codes(block))) > error(grid.values(grid.codes(block)))


@pytest.mark.parametrize("form", ENCODINGS)
def test_a_scale_that_float16_cannot_store_is_refused(form):
    with pytest.raises(EdgekitError, match=f"which {form} cannot store in float16"):
        nearest(form, np.full((1, 32), 1e9, np.float32) * np.resize([1, -1], 32).astype(np.float32))
