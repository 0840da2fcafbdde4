"""GGUF files that edgekit writes, read by edgekit and by the package of the format's authors."""

import struct
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from edgekit.importers import gguf_write
from edgekit.importers.gguf import read_gguf
from edgekit.importers.gguf_write import size, write_gguf
from tests.gguf_files import encoded, gguf, toy_model

TYPED = {  # values whose number types a plain copy would lose
    "a.u8": struct.pack("<IB", 0, 200),
    "a.i64": struct.pack("<Iq", 11, -5),
    "a.f64": struct.pack("<Id", 12, 0.1),
    "a.u16s": struct.pack("<IIQ3H", 9, 2, 3, 1, 2, 3),
    "a.yes": True,
    "a.texts": ["x", "été"],
}


@pytest.fixture
def source(tmp_path):
    tensors = {
        "t": ("F32", (2, 3), encoded(np.arange(6, dtype=np.float32), "F32")),
        "q": ("Q8_0", (2, 2, 32), encoded(np.linspace(-1, 1, 128, dtype=np.float32), "Q8_0")),
        "h": ("F16", (5,), encoded(np.arange(5, dtype=np.float32), "F16")),
    }
    path = tmp_path / "source.gguf"
    path.write_bytes(gguf(TYPED, tensors))
    return read_gguf(path)


def test_a_copy_is_the_same_file_bit_for_bit(source, tmp_path):
    path = tmp_path / "copy.gguf"
    write_gguf(path, source.raw, list(source.tensors.values()))
    assert path.read_bytes() == source.path.read_bytes()
    assert path.stat().st_size == size(
        source.raw, [(tensor.name, tensor.shape, tensor.content.size) for tensor in source.tensors.values()]
    )


def test_another_reader_finds_the_same(source, tmp_path):
    package = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    path = tmp_path / "copy.gguf"
    write_gguf(
        path,
        {**source.raw, "b": 7, "c": 0.5, "d": "text", "e": np.arange(3, dtype=np.int32)},
        [*source.tensors.values()],
    )
    found = package.GGUFReader(path)
    fields = {name: field.contents() for name, field in found.fields.items()}
    assert fields["a.i64"] == -5
    assert fields["a.u16s"] == [1, 2, 3]
    assert (fields["b"], fields["c"], fields["d"], fields["e"]) == (7, 0.5, "text", [0, 1, 2])
    assert [str(item) for item in found.fields["a.u8"].types] == ["0"]
    for tensor in found.tensors:
        own = source.tensors[tensor.name]
        assert np.array_equal(package.dequantize(tensor.data, tensor.tensor_type).reshape(own.shape), own.values())
        assert [*reversed(tensor.shape.tolist())] == [*own.shape]


@pytest.mark.parametrize("at", [30, -32, -1])
def test_a_file_that_reads_back_otherwise_never_gets_its_name(source, tmp_path, monkeypatch, at):
    path, write = tmp_path / "copy.gguf", gguf_write._write

    def damaged(stream, raw, tensors):
        write(stream, raw, tensors)
        stream.flush()
        end = stream.seek(0, 2)
        stream.seek(at % end)
        with Path(stream.name).open("rb") as other:
            other.seek(at % end)
            stream.write(bytes([other.read(1)[0] ^ 1]))

    monkeypatch.setattr(gguf_write, "_write", damaged)
    if at == -1:  # the padding behind the last tensor, which means nothing
        write_gguf(path, source.raw, [*source.tensors.values()])
        return
    with pytest.raises(EdgekitError):
        write_gguf(path, source.raw, [*source.tensors.values()])
    assert [*tmp_path.iterdir()] == [source.path]


def test_ctrl_c_leaves_the_old_file(source, tmp_path):
    path = tmp_path / "copy.gguf"
    path.write_bytes(b"old")

    class Stopping(list):
        def __iter__(self):
            yield from super().__iter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, source.raw, Stopping(source.tensors.values()))
    assert path.read_bytes() == b"old"
    assert len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("value", [-1, None, [1, 2], {"a": 1}, np.zeros((2, 2), np.int32)])
def test_metadata_that_the_format_does_not_have_is_refused(source, tmp_path, value):
    with pytest.raises(EdgekitError, match="metadata 'key' is"):
        write_gguf(tmp_path / "copy.gguf", {"key": value}, [])


def test_a_language_model_is_copied(tmp_path):
    source = read_gguf(toy_model(tmp_path, "qwen2"))
    path = tmp_path / "copy.gguf"
    write_gguf(path, source.raw, [*source.tensors.values()])
    assert path.read_bytes() == source.path.read_bytes()
