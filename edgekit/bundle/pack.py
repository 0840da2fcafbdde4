"""Pack a bundle into one small file, to send it to a device or to store it.

    EDGEPACK | version | manifest (JSON) | weights | golden rows | graph, if it is one | SHA-256 of all before

Each stream is compressed. Codes of encoded weights are Huffman-coded, as in Han et al. 2016, section 4 (DEFLATE without
matches, because neighbouring weights do not repeat). The few float arrays are stored byte plane by byte plane, which
groups the exponents. The format is lossless: weights, inputs and outputs come back bit for bit. The packed file leaves
out the history (records, report) and all golden rows but two.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.bundle.bounded import LARGEST_TEXT, array_bytes, array_from, claim, inflate
from edgekit.bundle.encoding import from_arrays, to_arrays
from edgekit.bundle.format import FORMAT, GRAPH, ONNX, Bundle, Manifest, assemble, assemble_graph
from edgekit.errors import EdgekitError

MAGIC, VERSION = b"EDGEPACK", 1
GOLDEN_ROWS = 2
LEFT_OUT = ("records", "recipe", "metrics", "versions", "files")  # history; `parent` names the bundle that holds it
Array = npt.NDArray[np.generic]


def pack(bundle: Bundle) -> bytes:
    """Return the packed bytes of a bundle."""
    skeleton, arrays = _stored(bundle)
    inputs, outputs = bundle.golden()
    golden = {f"in.{name}": array[:GOLDEN_ROWS] for name, array in inputs.items()}
    golden |= {f"out.{name}": array[:GOLDEN_ROWS] for name, array in outputs.items()}
    defaults = {item.name: item.default for item in fields(Manifest)}
    manifest = {
        name: value
        for name, value in asdict(replace(bundle.manifest, parent=bundle.digest)).items()
        if name not in LEFT_OUT and value != defaults[name]
    }
    header = {"manifest": manifest, "weights": _shapes(arrays), "golden": _shapes(golden)}
    streams = [
        zlib.compress(json.dumps(header, separators=(",", ":")).encode(), 9),
        *(_pack_arrays(group) for group in (arrays, golden)),
        *([zlib.compress(skeleton, 9)] if skeleton else []),
    ]
    body = MAGIC + bytes([VERSION]) + b"".join(struct.pack("<I", len(stream)) + stream for stream in streams)
    return body + hashlib.sha256(body).digest()


def unpack(content: bytes, source: str) -> Bundle:
    """Return the bundle in a packed file, verified."""
    if content[: len(MAGIC)] != MAGIC:
        raise EdgekitError(f"{source}: not a packed bundle, it does not begin with {MAGIC.decode()}")
    if len(content) > len(MAGIC) and content[len(MAGIC)] != VERSION:
        raise EdgekitError(f"{source}: packed format {content[len(MAGIC)]}; this edgekit reads {VERSION}")
    body, digest = content[:-32], content[-32:]
    if hashlib.sha256(body).digest() != digest:
        raise EdgekitError(
            f"{source}: the SHA-256 at its end does not match; the file is damaged or cut off, copy it again"
        )
    try:
        return _parse(body, source)
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        SyntaxError,
        OverflowError,
        struct.error,
        zlib.error,
    ) as error:
        raise EdgekitError(f"{source}: not a packed bundle that edgekit wrote ({error}); pack it again") from None


def _parse(body: bytes, source: str) -> Bundle:
    """Return the bundle in a verified file."""
    streams, at = [], len(MAGIC) + 1
    while at < len(body):
        (size,) = struct.unpack_from("<I", body, at)
        streams.append(body[at + 4 : at + 4 + size])
        at += 4 + size
    header = json.loads(inflate(streams[0], f"{source}: its manifest", largest=LARGEST_TEXT))
    manifest = Manifest.from_json(json.dumps({"format": FORMAT, **header["manifest"]}).encode(), source)
    arrays = _unpack_arrays(streams[1], header["weights"], source)
    golden = _unpack_arrays(streams[2], header["golden"], source)
    inputs = {spec.name: golden[f"in.{spec.name}"] for spec in manifest.inputs}
    outputs = {spec.name: golden[f"out.{spec.name}"] for spec in manifest.outputs}
    if manifest.family == ONNX:
        from edgekit.bundle.onnx_file import with_weights

        return assemble_graph(manifest, with_weights(inflate(streams[3], source), arrays), (inputs, outputs))
    stored = from_arrays(arrays, manifest.bits)
    weights = {name: value if isinstance(value, np.ndarray) else value.decode() for name, value in stored.items()}
    encodings = {name: value for name, value in stored.items() if not isinstance(value, np.ndarray)}
    return assemble(manifest, weights, encodings, (inputs, outputs))


def _stored(bundle: Bundle) -> tuple[bytes, dict[str, Array]]:
    """Return the weights as stored and, for a graph, the graph without them."""
    if not bundle.is_graph:
        return b"", to_arrays(bundle.weights(), bundle.encodings())
    from edgekit.bundle.onnx_file import without_weights

    return without_weights(bundle.contents[GRAPH])


def _shapes(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: [array.dtype.str, *array.shape] for name, array in arrays.items()}


def _pack_arrays(arrays: Mapping[str, Array]) -> bytes:
    """Return codes of one byte per value and the planes of wider values, in two streams with separate statistics."""
    codes = b"".join(array.tobytes() for array in arrays.values() if array.itemsize == 1)
    wide = b"".join(_planes(array) for array in arrays.values() if array.itemsize > 1)
    huffman = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    first = huffman.compress(codes) + huffman.flush()
    return struct.pack("<I", len(first)) + first + zlib.compress(wide, 9)


def _unpack_arrays(stream: bytes, shapes: Mapping[str, Any], source: str) -> dict[str, Array]:
    """Return the arrays. Their declared sizes must be within the limit, and the streams must hold exactly these."""
    declared = {name: (np.dtype(dtype), shape) for name, (dtype, *shape) in shapes.items()}
    lengths = {name: array_bytes(dtype, shape) for name, (dtype, shape) in declared.items()}
    narrow = sum(lengths[name] for name, (dtype, _) in declared.items() if dtype.itemsize == 1)
    wide = sum(lengths.values()) - narrow
    claim(wide + 5 * narrow, len(stream), source)  # a code of one byte is decoded to a float of four
    (size,) = struct.unpack_from("<I", stream)
    codes = inflate(stream[4 : 4 + size], source, expected=narrow, wbits=-15)
    planes = inflate(stream[4 + size :], source, expected=wide)
    arrays: dict[str, Array] = {}
    at = {True: 0, False: 0}
    for name, (dtype, shape) in declared.items():
        one_byte = dtype.itemsize == 1
        raw = (codes if one_byte else planes)[at[one_byte] : at[one_byte] + lengths[name]]
        at[one_byte] += lengths[name]
        arrays[name] = array_from(_unplaned(raw, dtype.itemsize), dtype, shape)
    return arrays


def _unplaned(raw: bytes, itemsize: int) -> bytes:
    """The inverse of `_planes`: return all bytes of the first number, then those of the second, and so on."""
    return np.frombuffer(raw, np.uint8).reshape(itemsize, -1).T.tobytes()


def _planes(array: Array) -> bytes:
    """Return all first bytes, then all second bytes, and so on."""
    return np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize).T.tobytes()
