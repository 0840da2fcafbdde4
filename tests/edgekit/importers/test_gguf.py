"""GGUF files: what a whole one holds, and the one line that each damaged one gets."""

import struct

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from edgekit.importers.gguf_encode import nearest
from edgekit.importers.gguf_formats import FORMATS
from tests.gguf_files import encoded, entry, gguf, text, toy_model

VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)
WHOLE = gguf({"a": 3, "b": "text", "c": ["x", "y"], "d": [1, 2]}, {"t": ("F32", (2, 32), encoded(VALUES, "F32"))})


def written(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return path


def test_metadata_and_tensors_are_read(tmp_path):
    file = read_gguf(written(tmp_path, WHOLE))
    assert file.metadata["a"] == 3
    assert file.metadata["b"] == "text"
    assert file.metadata["c"] == ["x", "y"]
    assert file.metadata["d"].tolist() == [1, 2]
    assert np.array_equal(file.tensors["t"].values(), VALUES)
    assert file.get("e", int, 5) == 5


@pytest.mark.parametrize("form", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_values_survive_a_format_to_its_precision(form):
    values = np.random.default_rng(0).normal(0, 1, (3, 64)).astype(np.float32)
    number = next(number for number, item in FORMATS.items() if item.name == form)
    raw = np.frombuffer(encoded(values, form), np.uint8).reshape(3, -1)
    error = np.abs(FORMATS[number].decode(raw) - values).max()
    assert error <= {"F32": 0, "F16": 2e-3, "BF16": 3e-2, "Q8_0": 0.02, "Q4_0": 0.3, "Q4_1": 0.2}[form]


@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)
def test_every_format_decodes_as_the_package_of_its_authors_does(form):
    gguf_package = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    number = next(number for number, item in FORMATS.items() if item is form)
    raw = np.random.default_rng(number).integers(0, 256, (4, 3 * form.bytes), dtype=np.uint8)
    given = raw.view({"F32": "<f4", "F16": "<f2"}.get(form.name, np.uint8))
    with np.errstate(all="ignore"):
        expected = gguf_package.dequantize(given, gguf_package.GGMLQuantizationType(number))
        assert np.array_equal(form.decode(raw), expected, equal_nan=True)
        assert not np.array_equal(form.decode(raw ^ 1), expected, equal_nan=True)  # a flipped bit is seen


def test_encoding_to_q8_0_moves_a_value_by_half_a_step_at_most():
    values = np.random.default_rng(0).normal(0, 1, (5, 96)).astype(np.float32)
    values[0] = 0
    steps = np.abs(values.reshape(5, 3, 32)).max(-1, keepdims=True) / 127
    moved = np.abs(FORMATS[8].decode(nearest("Q8_0", values)) - values).reshape(5, 3, 32)
    assert (moved <= 0.51 * steps + 127 * steps * 2**-11).all()  # and the rounding of the scale to float16


DAMAGED = {
    "empty": (b"", "not a readable file"),
    "another magic": (b"GGML" + WHOLE[4:], "no GGUF file"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + WHOLE[8:], "version 1"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + WHOLE[8:], "version 50331648"),
    "cut in the header": (WHOLE[:60], "damaged"),
    "cut in the data": (WHOLE[:-1], "ends before tensor 't'"),
    "keys without end": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "keys"),
    "tensors without end": (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "tensors"),
    "a text without end": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62) + bytes(64),
        "characters",
    ),
    "a text that is no UTF-8": (gguf({"a": struct.pack("<I", 8) + text(b"\xff\xfe")}, {}), "UTF-8"),
    "an array of 2**60 numbers": (gguf({"a": struct.pack("<IIQ", 9, 0, 1 << 60)}, {}), "values in 'a'"),
    "an array of 2**60 texts": (gguf({"a": struct.pack("<IIQ", 9, 8, 1 << 60)}, {}), "strings in 'a'"),
    "an array of arrays": (gguf({"a": struct.pack("<IIQ", 9, 9, 1) + bytes(12)}, {}), "array of type number 9"),
    "an unknown type": (gguf({"a": struct.pack("<I", 99)}, {}), "type number 99"),
    "alignment 0": (gguf({"general.alignment": 0}, {}), "general.alignment"),
    "a key twice": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry("a", 1) * 2, "'a' twice"),
}


@pytest.mark.parametrize(("content", "problem"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line_that_says_why(tmp_path, content, problem):
    with pytest.raises(EdgekitError) as caught:
        read_gguf(written(tmp_path, content))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tensors", "pairs", "problem"), [(10**6, 0, "list of tensors"), (0, 10**6, "metadata")])
def test_a_header_that_would_take_too_much_memory_is_refused(tmp_path, tensors, pairs, problem):
    content = b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + bytes(24_000_000)
    with pytest.raises(EdgekitError, match=f"{problem}.*800,000,000 bytes in memory"):
        read_gguf(written(tmp_path, content))


def header_of_tensor(name=b"t", axes=(32,), code=0, offset=0):
    start = b"GGUF" + struct.pack("<IQQ", 3, 1, 0)
    return start + text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, code, offset) + bytes(256)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (header_of_tensor(axes=(1,) * 5), "5 axes"),
        (header_of_tensor(axes=()), "0 axes"),
        (header_of_tensor(axes=(1 << 62, 1 << 62)), "ends before"),
        (header_of_tensor(axes=(0,)), "cannot store"),
        (header_of_tensor(axes=(33,), code=8), "Q8_0 cannot store"),
        (header_of_tensor(code=77), "format number 77"),
        (header_of_tensor(offset=1 << 63), "ends before"),
    ],
)
def test_a_tensor_that_the_file_cannot_hold_is_refused(tmp_path, content, problem):
    with pytest.raises(EdgekitError, match=problem):
        read_gguf(written(tmp_path, content))


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """Each would take its own memory in an engine."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 2, 0)
    for offset, problem in ((0, "'b' in the bytes of 'a'"), (124, "'b' in the bytes of 'a'"), (128, None)):
        table = [text(name) + struct.pack("<IQIQ", 1, 32, 0, at) for name, at in ((b"a", 0), (b"b", offset))]
        header = start + b"".join(table)
        path = written(tmp_path, header + bytes(-len(header) % 32) + bytes(256))
        if problem is None:
            assert list(read_gguf(path).tensors) == ["a", "b"]
        else:
            with pytest.raises(EdgekitError, match=problem):
                read_gguf(path)


def test_a_value_of_another_type_is_refused(tmp_path):
    file = read_gguf(written(tmp_path, WHOLE))
    with pytest.raises(EdgekitError, match="'b' is a str; expected int"):
        file.get("b", int)
    with pytest.raises(EdgekitError, match="has no 'z'"):
        file.get("z", int)


def test_a_file_is_mapped_and_not_read(tmp_path):
    path = toy_model(tmp_path)
    file = read_gguf(path)
    tensor = file.tensors["token_embd.weight"]
    assert not tensor.content.flags.writeable
    assert tensor.content.base is not None
