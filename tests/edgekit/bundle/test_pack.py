"""Packing: bit for bit there and back, and an error for every kind of damage."""

import contextlib
import hashlib
import json
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgekit.bundle import onnx_file
from edgekit.bundle.encoding import Affine, Palette
from edgekit.bundle.format import GRAPH, Manifest, assemble, assemble_graph, model_key
from edgekit.bundle.pack import GOLDEN_ROWS, MAGIC, _pack_arrays, _shapes, _unpack_arrays, pack, unpack
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from tests.edgekit.passes.graphs import mlp, stored

MANIFEST = Manifest(
    "x", "t2", {}, (TensorSpec("in", ("batch", 2)),), (TensorSpec("out", ("batch", 1)),), preprocessing={"id": "p"}
)
GOLDEN = ({"in": np.arange(6, dtype=np.float32).reshape(3, 2)}, {"out": np.zeros((3, 1), np.float32)})
floats = st.floats(allow_nan=False, allow_infinity=False, width=32)


def bundle_of(**weights):
    """A bundle of plain arrays and encodings; no network has these weights."""
    encodings = {name: value for name, value in weights.items() if not isinstance(value, np.ndarray)}
    plain = {name: value if isinstance(value, np.ndarray) else value.decode() for name, value in weights.items()}
    return assemble(MANIFEST, plain, encodings, GOLDEN)


@pytest.fixture(scope="module")
def packed():
    rng = np.random.default_rng(0)
    return pack(
        bundle_of(
            plain=rng.normal(size=(4, 3)).astype(np.float32),
            palette=Palette(3, rng.integers(0, 8, (5, 6)).astype(np.uint8), rng.normal(size=8).astype(np.float32)),
        )
    )


@settings(max_examples=60, deadline=None)
@given(
    plain=hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4), elements=floats),
    bits=st.integers(1, 8),
    codes=hnp.arrays(np.uint8, hnp.array_shapes(max_dims=2, max_side=5), elements=st.integers(0, 1)),
    seed=st.integers(0, 99),
)
def test_every_bit_comes_back(plain, bits, codes, seed):
    rng = np.random.default_rng(seed)
    palette = Palette(bits, codes * np.uint8(2**bits - 1), rng.normal(size=2**bits).astype(np.float32))
    limit = 2 ** (max(bits, 2) - 1) - 1
    affine = Affine(
        max(bits, 2), rng.integers(-limit, limit + 1, (3, 4)).astype(np.int8), rng.random((3, 1)).astype(np.float32)
    )
    bundle = bundle_of(plain=plain, palette=palette, affine=affine)
    back = unpack(pack(bundle), "x")
    for name, value in bundle.weights().items():
        assert back.weights()[name].tobytes() == value.tobytes()
        assert back.weights()[name].shape == value.shape
    for name, encoding in bundle.encodings().items():
        assert back.encodings()[name].bits == encoding.bits
        assert back.encodings()[name].codes.tobytes() == encoding.codes.tobytes()
    assert pack(back)[: len(MAGIC) + 1] == pack(bundle)[: len(MAGIC) + 1]


@settings(max_examples=80, deadline=None)
@given(
    arrays=st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.sampled_from(["<f4", "<f8", "<i8", "|i1", "|u1", "<i2", "|b1", ">f4"]).flatmap(
            lambda kind: hnp.arrays(np.dtype(kind), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
        ),
        max_size=4,
    )
)
def test_arrays_of_any_type_and_shape_come_back(arrays):
    back = _unpack_arrays(_pack_arrays(arrays), _shapes(arrays), "x")
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        assert back[name].tobytes() == array.tobytes()


def test_what_travels_and_what_stays_behind(tiny_bundle):
    records = ({"pass": "cluster", "kept": True},)
    rich = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, records=records, preprocessing={"id": "p"}))
    back = unpack(pack(rich), "x")
    assert back.manifest.records == ()
    assert back.manifest.parent == rich.digest
    for name in ("name", "family", "arguments", "inputs", "outputs", "classes", "preprocessing", "bits"):
        assert getattr(back.manifest, name) == getattr(rich.manifest, name)
    inputs, outputs = back.golden()
    assert len(inputs["light_curve"]) == len(outputs["probabilities"]) == GOLDEN_ROWS
    assert np.array_equal(inputs["light_curve"], tiny_bundle.golden()[0]["light_curve"][:GOLDEN_ROWS])


def test_a_packed_file_is_a_bundle(tiny_bundle, tmp_path):
    (tmp_path / "t.edgepack").write_bytes(pack(tiny_bundle))
    opened = open_bundle(tmp_path / "t.edgepack")
    write_bundle(opened, tmp_path / "t.edge")
    again = open_bundle(tmp_path / "t.edge")
    assert {name: value.tobytes() for name, value in again.weights().items()} == {
        name: value.tobytes() for name, value in tiny_bundle.weights().items()
    }


def test_a_graph_comes_back_byte_for_byte_from_either_form(tmp_path):
    graph = mlp().model.SerializeToString(deterministic=True)
    given = replace(MANIFEST, arguments={"left": 1}, bits={"w": 4}, inputs=(TensorSpec("x", ("batch", 32)),))
    golden = ({"x": np.ones((3, 32), np.float32)}, {"out": np.zeros((3, 1), np.float32)})
    bundle = assemble_graph(given, graph, golden)
    assert (bundle.manifest.family, bundle.manifest.arguments, bundle.manifest.bits) == ("onnx", {}, {})
    assert (bundle.manifest.name, bundle.is_graph, bundle.encodings()) == ("x", True, {})
    assert bundle.parameters == sum(value.size for value in stored(mlp()).values())
    (tmp_path / "g.edgepack").write_bytes(pack(bundle))
    write_bundle(bundle, tmp_path / "g.edge")
    for name, rows in (("g.edgepack", GOLDEN_ROWS), ("g.edge", 3)):
        back = open_bundle(tmp_path / name)
        assert back.contents[GRAPH] == graph
        assert (back.path, model_key(back)) == (tmp_path / name, model_key(bundle))
        assert np.array_equal(back.golden()[0]["x"], golden[0]["x"][:rows])
    assert len(pack(bundle)) < len(graph)


def test_packing_is_reproducible(tiny_bundle):
    assert pack(tiny_bundle) == pack(tiny_bundle)


def test_few_codes_and_zeros_make_small_files():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(64, 64)).astype(np.float32)
    codes = np.abs(values * 2).round().clip(0, 15).astype(np.uint8)
    fine = (values * 40 + 128).clip(0, 255).astype(np.uint8)
    sizes = {
        "float32": len(pack(bundle_of(w=values))),
        "8 bit": len(pack(bundle_of(w=Palette(8, fine, values.ravel()[:256])))),
        "4 bit": len(pack(bundle_of(w=Palette(4, codes, values.ravel()[:16])))),
        "4 bit, most of them zero": len(pack(bundle_of(w=Palette(4, codes * (codes > 3), values.ravel()[:16])))),
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    frequencies = np.bincount(codes.ravel()) / codes.size
    entropy = -(frequencies[frequencies > 0] * np.log2(frequencies[frequencies > 0])).sum() * codes.size / 8
    empty = len(pack(bundle_of(w=Palette(4, codes[:1, :1], values.ravel()[:16]))))
    assert entropy < sizes["4 bit"] - empty + 8 < 1.1 * entropy, "codes take little more than their entropy"


def test_damage_at_any_byte_is_an_error(packed):
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0x41
        with pytest.raises(EdgekitError, match="x"):
            unpack(bytes(damaged), "x")


def test_a_file_cut_anywhere_is_an_error(packed):
    for length in range(len(packed)):
        with pytest.raises(EdgekitError, match="x"):
            unpack(packed[:length], "x")
    with pytest.raises(EdgekitError, match="damaged"):
        unpack(packed + b"\0", "x")


def resealed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_file_that_lies_under_a_good_seal_is_read_or_refused(data, packed):
    body = bytearray(packed[:-32])
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(len(MAGIC) + 1, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(len(MAGIC) + 1, len(body)))
    for content in (bytes(body), bytes(body[:cut])):
        with contextlib.suppress(EdgekitError):  # and nothing else
            unpack(resealed(content), "x").weights()


@pytest.mark.parametrize(
    "header",
    [[], {}, {"manifest": {}, "weights": {}, "golden": {}}, {"manifest": 3}, {"manifest": {"name": 1}, "weights": []}],
)
def test_a_header_of_another_form_is_refused(header):
    stream = zlib.compress(json.dumps(header).encode())
    body = MAGIC + b"\x01" + struct.pack("<I", len(stream)) + stream
    with pytest.raises(EdgekitError, match=r"^x: "):
        unpack(resealed(body), "x")


def test_what_is_not_a_packed_bundle():
    for content, words in ((b"", "begin"), (b"hello", "begin"), (MAGIC, "damaged"), (MAGIC + b"\x07", "format 7")):
        with pytest.raises(EdgekitError, match=words):
            unpack(content, "x")


@pytest.fixture(scope="module")
def packed_graph():
    """The bytes of a packed graph up to its last stream, and that stream's content: the graph without its weights."""
    specs = (TensorSpec("x", ("batch", 32)),), (TensorSpec("out", ("batch", 1)),)
    golden = ({"x": np.ones((2, 32), np.float32)}, {"out": np.zeros((2, 1), np.float32)})
    content = pack(assemble_graph(Manifest("g", "onnx", {}, *specs), mlp().model.SerializeToString(), golden))
    at = len(MAGIC) + 1
    for _ in range(3):
        at += 4 + struct.unpack_from("<I", content, at)[0]
    return content[:at], zlib.decompress(content[at + 4 : -32])


def with_skeleton(packed_graph, skeleton):
    stream = zlib.compress(skeleton)
    return resealed(packed_graph[0] + struct.pack("<I", len(stream)) + stream)


def test_a_damaged_graph_skeleton_under_a_good_seal_is_refused_in_one_line(packed_graph):
    skeleton = packed_graph[1]
    assert unpack(with_skeleton(packed_graph, skeleton), "x").is_graph
    said = []
    for place in range(0, len(skeleton), 3):
        for damaged in (skeleton[:place], skeleton[:place] + b"\xff" + skeleton[place + 1 :]):
            try:
                unpack(with_skeleton(packed_graph, damaged), "x")
            except EdgekitError as error:
                said.append(str(error))
    assert len(said) > len(skeleton) / 6
    assert [text for text in said if not text.startswith("x: ") or "\n" in text] == []
    with pytest.raises(EdgekitError, match=r"x: not a packed bundle that edgekit wrote \(the graph is damaged"):
        unpack(with_skeleton(packed_graph, b"\xff" * 9), "x")


def test_planted_without_its_guard_a_damaged_skeleton_ends_in_the_error_of_protobuf(packed_graph, monkeypatch):
    monkeypatch.setattr(onnx_file, "with_weights", lambda skeleton, arrays: onnx_file.onnx.load_from_string(skeleton))
    with pytest.raises(Exception, match=r"(?i)pars") as caught:
        unpack(with_skeleton(packed_graph, b"\xff" * 9), "x")
    assert not isinstance(caught.value, EdgekitError)
