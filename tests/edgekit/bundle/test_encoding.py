"""Encodings: lossless on disk, and sizes as counted by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.bundle.encoding import Affine, Palette, from_arrays, stored_bytes, to_arrays

shapes = hnp.array_shapes(min_dims=2, max_dims=3, max_side=5)


@st.composite
def encodings(draw):
    shape, bits = draw(shapes), draw(st.integers(2, 8))
    if draw(st.booleans()):
        limit = 2 ** (bits - 1) - 1
        codes = draw(hnp.arrays(np.int8, shape, elements=st.integers(-limit, limit)))
        rows = draw(st.sampled_from([shape[0], 1]))
        scale = draw(hnp.arrays(np.float32, (rows, *[1] * (len(shape) - 1)), elements=st.floats(2**-20, 10, width=32)))
        return Affine(bits, codes, scale)
    count = draw(st.integers(1, 2**bits))
    codes = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, count - 1)))
    return Palette(bits, codes, draw(hnp.arrays(np.float32, count, elements=st.floats(-10, 10, width=32))))


@settings(max_examples=60, deadline=None)
@given(encoding=encodings(), plain=hnp.arrays(np.float32, shapes, elements=st.floats(-10, 10, width=32)))
def test_arrays_and_back(encoding, plain):
    weights = {"w": encoding.decode(), "plain": plain}
    back = from_arrays(to_arrays(weights, {"w": encoding}), {"w": encoding.bits})
    assert set(back) == {"w", "plain"}
    assert type(back["w"]) is type(encoding)
    assert back["w"].bits == encoding.bits
    assert back["w"].decode().tobytes() == encoding.decode().tobytes()
    assert back["plain"].tobytes() == plain.tobytes()


def test_decoding_by_hand():
    affine = Affine(4, np.int8([[1, -2], [7, 0]]), np.float32([[0.5], [0.25]]))
    assert affine.decode().tolist() == [[0.5, -1.0], [1.75, 0.0]]
    palette = Palette(2, np.uint8([[0, 2], [1, 1]]), np.float32([-1.0, 0.0, 3.0]))
    assert palette.decode().tolist() == [[-1.0, 3.0], [0.0, 0.0]]
    assert affine.decode().dtype == palette.decode().dtype == np.float32


def test_weights_are_stored_as_float32_in_one_memory_order():
    given = np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3))
    stored = to_arrays({"w": given}, {})["w"]
    assert (stored.dtype, stored.flags.c_contiguous, stored.tolist()) == (np.float32, True, given.tolist())


def test_a_weight_beside_its_codebook_is_not_written():
    encoding = Palette(1, np.uint8([[0, 1]]), np.float32([1.0, 2.0]))
    with pytest.raises(AssertionError, match="w differs from its encoding"):
        to_arrays({"w": encoding.decode() + 1e-6}, {"w": encoding})


def test_sizes_by_hand():
    palette = Palette(3, np.zeros((5, 5), np.uint8), np.zeros(8, np.float32))
    affine = Affine(4, np.zeros((4, 10), np.int8), np.zeros((4, 1), np.float32))
    weights = {"p": palette.decode(), "a": affine.decode(), "plain": np.zeros(7, np.float32)}
    # 25 codes of 3 bits are 75 bits, 10 bytes; 8 shared values; 40 codes of 4 bits; 4 scales; 7 floats
    assert stored_bytes(weights, {"p": palette, "a": affine}) == (10 + 32) + (20 + 16) + 28
