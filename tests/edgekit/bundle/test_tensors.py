"""Named tensors: what fits a description, synthetic rows, and archives that come back or are refused."""

import contextlib
import shutil
import zipfile
from io import BytesIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgekit.bundle.bounded import arrays_from_npz
from edgekit.bundle.format import GOLDEN
from edgekit.bundle.tensors import (
    TensorSpec,
    arrays_to_bytes,
    golden_inputs,
    multiple,
    parse_spec,
    read_arrays,
)
from edgekit.errors import EdgekitError


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), cut=st.booleans())
def test_a_damaged_npz_is_read_or_refused(place, byte, cut, tiny_bundle):
    content = bytearray(tiny_bundle.contents[GOLDEN])
    at = int(place * len(content))
    content[at] ^= byte
    with contextlib.suppress(EdgekitError):  # and nothing else
        arrays_from_npz(bytes(content[:at] if cut else content), "x.npz")


def test_what_is_no_npz(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    np.savez(tmp_path / "objects.npz", a=np.array([{}], dtype=object))
    for name in ("one.npy", "objects.npz"):
        with pytest.raises(EdgekitError, match=name):
            arrays_from_npz((tmp_path / name).read_bytes(), name)
    shutil.make_archive(str(tmp_path / "text"), "zip", tmp_path, ".")
    with pytest.raises(EdgekitError, match=r"text\.zip"):
        arrays_from_npz((tmp_path / "text.zip").read_bytes(), "text.zip")


def test_arrays_come_back_and_numpy_reads_them(tmp_path):
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array(7), "c": np.zeros((0, 2), np.int8)}
    content = arrays_to_bytes(arrays)
    assert content == arrays_to_bytes(dict(reversed(arrays.items())))
    (tmp_path / "x.npz").write_bytes(content)
    with np.load(tmp_path / "x.npz") as archive:
        for found in (archive, arrays_from_npz(content, "x")):
            assert sorted(found) == ["a", "b", "c"]
            for name, array in arrays.items():
                assert np.array_equal(found[name], array)
                assert found[name].dtype == array.dtype


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((2, 12, 2), "float32", None),
        ((0, 12, 2), "float32", None),
        ((2, 12, 3), "float32", "shape"),
        ((12, 2), "float32", "shape"),
        ((2, 12, 2), "float64", "dtype"),
    ],
)
def test_tensor_spec(shape, dtype, words):
    spec = TensorSpec("x", ("batch", 12, 2))
    if words is None:
        spec.check(np.zeros(shape, dtype))
    else:
        with pytest.raises(EdgekitError, match=f"'x'.*{words}"):
            spec.check(np.zeros(shape, dtype))


def test_golden_inputs_differ_in_every_element_and_fit():
    specs = (TensorSpec("a", ("batch", 5, 2)), TensorSpec("b", ("batch", 3)))
    made = golden_inputs(specs, 4)
    for spec in specs:
        spec.check(made[spec.name])
        assert len(np.unique(made[spec.name])) == made[spec.name].size


def test_golden_inputs_by_their_definition():
    specs = (TensorSpec("a", ("batch", 3)), TensorSpec("b", ("batch", "4*faces"), "int64"), TensorSpec("c", ("batch",)))
    made = golden_inputs(specs, 2)
    assert made["a"].ravel() == pytest.approx([np.sin(0.37 * k) for k in range(6)], rel=1e-6)
    assert made["b"].ravel().tolist() == [k * 4 % 8 for k in range(16)]
    assert (made["b"].shape, made["b"].dtype) == ((2, 8), np.int64)
    assert made["c"] == pytest.approx([np.sin(0.37 * 3 * k) for k in range(2)], rel=1e-6)


@pytest.mark.parametrize(
    ("axis", "length", "words"),
    [
        ("4*faces", 8, None),
        ("2*pairs", 0, "has length 0 along axis 1; this model needs a multiple of 2 .2.$"),
        ("4*faces", 6, "has length 6 along axis 1; this model needs a multiple of 4 .4 or 8."),
        ("4*faces", 3, "a multiple of 4 .4.$"),
        ("faces", 0, None),
        (5, 5, None),
    ],
)
def test_an_axis_of_groups_has_whole_groups(axis, length, words):
    spec = TensorSpec("x", ("batch", axis))
    array = np.zeros((1, length), np.float32)
    if words is None:
        spec.check(array)
    else:
        with pytest.raises(EdgekitError, match=words):
            spec.check(array)


def test_multiples_and_axes_that_are_none():
    assert [multiple(axis) for axis in ("9*faces", "12*x", "faces", 9)] == [9, 12, 1, 1]
    for axis in ("0*faces", "9*", "*faces", "a b", "", "9*9*x"):
        with pytest.raises(EdgekitError, match="expected a name, or a multiple"):
            TensorSpec("x", ("batch", axis))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image:uint8:batch,3,224", TensorSpec("image", ("batch", 3, 224), "uint8")),
        ("x:float32:n", TensorSpec("x", ("n",), "float32")),
        ("x:float32:batch,9*faces", TensorSpec("x", ("batch", "9*faces"))),
        ("x:float32:", "--input 'x:float32:': expected NAME:DTYPE:AXES"),
        ("x:float32", "expected NAME:DTYPE:AXES"),
        ("x:float32:batch:3", "expected NAME:DTYPE:AXES"),
        ("x:float33:batch,3", "unknown dtype 'float33'"),
        ("x:float32:1,3", "--input 'x:float32:1,3': the first axis is the batch, of any length"),
    ],
)
def test_a_description_on_the_command_line(text, expected):
    if isinstance(expected, TensorSpec):
        assert parse_spec(text) == expected
    else:
        with pytest.raises(EdgekitError, match=expected):
            parse_spec(text)


def test_an_archive_has_no_pickle_no_time_and_one_memory_order(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = arrays_to_bytes({"a": array})
    assert arrays_to_bytes({"a": np.asfortranarray(array)}) == content
    assert [item.date_time for item in zipfile.ZipFile(BytesIO(content)).infolist()] == [(1980, 1, 1, 0, 0, 0)]
    with pytest.raises(ValueError, match="allow_pickle"):
        arrays_to_bytes({"a": np.array([{}], dtype=object)})
    (tmp_path / "a.npz").write_bytes(content)
    assert np.array_equal(read_arrays(tmp_path / "a.npz")["a"], array)
    (tmp_path / "text.npz").write_bytes(b"hello")
    with pytest.raises(EdgekitError, match=r"text\.npz: not an \.npz archive"):
        read_arrays(tmp_path / "text.npz")
    with pytest.raises(EdgekitError, match=r"b\.npz: no such file"):
        read_arrays(tmp_path / "b.npz")
