"""The engine in C for CPUs: weights in 4, 8, 16 or 32 bits as the file has them, activations in 8 bits.

The source is compiled for the model's head size and for this machine, and kept in edgekit's cache. Logits are the same
bits for every schedule: for every way of cutting sequences into steps, for every batch, for every number of threads,
and on every machine.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import cache
from edgekit.bundle.bounded import parse_size
from edgekit.errors import EdgekitError, unknown
from edgekit.importers.gguf import Tensor
from edgekit.importers.gguf_encode import nearest
from edgekit.machine import memory_bytes
from exporters.c.library import Compiler, is_complete, keep_library
from runtimes.llm.architecture import Architecture, Layer, Model
from runtimes.llm.blocks import BLOCK
from runtimes.llm.engine import Batch, Engine, Floats, Item, Saved, owned
from runtimes.llm.streaming import LayerStream, kept_layers, release_pages
from runtimes.llm.tails import Tails

FOLDER = Path(__file__).parent / "native"
FILES = ("lanes.h", "matrix.c", "attention.c", "attention_int4.c", "layer.c", "engine.c")
# contraction would round differently from compiler to compiler; results are the same bits everywhere without it
FLAGS = ("-std=gnu99", "-O3", "-ffp-contract=off", "-pthread")
FORMATS = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2, "F16": 3, "BF16": 4, "F32": 5}  # as the C source numbers them
CACHES = {"f16": 0, "int8": 1, "int4": 2}
WEIGHTS = ("kept", "q8_0")
INT4_BLOCK = 64  # tokens to a block in 4 bits
MATRICES = ("query", "key", "value", "attention_output", "gate", "up", "down")  # in the order of the C source
VECTORS = (
    *("attention_norm", "mlp_norm", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm"),
    *("attention_norm_bias", "attention_output_bias", "post_attention_norm", "up_bias", "down_bias", "post_mlp_norm"),
)
MOST_QUERIES = 16  # to a head of keys
PART_VALUES = 1 << 18  # of a matrix that are decoded at a time
GROUP = 32  # inputs that share a scale


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "width", "heads", "kv_heads", "hidden", "vocabulary")),
        *((name, ctypes.c_int32) for name in ("rope_size", "adjacent")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("cache", "blocks", "most_rows", "most_length", "threads")),
        ("weight_bytes", ctypes.c_size_t),
        *((name, ctypes.c_float) for name in ("query_scale", "score_cap", "logit_cap", "embedding_scale")),
        *((name, ctypes.c_int32) for name in ("gelu", "parallel")),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("ids", "embeddings", "cosines", "sines", "index", "tables", "tails")),
        ("follows", ctypes.c_void_p),
    ]


class NativeEngine(Engine):
    """A model in C. blocks: of 16 tokens, of the cache; kv: how the cache stores keys and values, "f16", "int8" or
    "int4"; threads: by default one for each core; rows: the most tokens of a step; compiler: its command, by default
    $CC or the first of cc, gcc, clang; flags: by default for this machine; weights: "kept" stores them in the file's
    format, and "q8_0" stores matrices of floats in 8 bits; weights_memory: bytes, or a text such as "2GB": the most
    memory for weights; layers that do not fit are read from the file in each step, which is slower."""

    def __init__(
        self,
        model: Model,
        *,
        blocks: int = 512,
        kv: str = "f16",
        threads: int | None = None,
        rows: int = 512,
        compiler: str | None = None,
        flags: Sequence[str] = ("-march=native",),
        weights: str = "kept",
        weights_memory: int | str | None = None,
    ) -> None:
        if kv not in CACHES:
            raise EdgekitError(f"{unknown('key-value cache', kv, CACHES, where='the native engine')}; torch has others")
        if weights not in WEIGHTS:
            raise unknown("way to store weights", weights, WEIGHTS)
        self._floats_to_q8_0 = weights == "q8_0"
        super().__init__(model.architecture, blocks, rows, INT4_BLOCK if kv == "int4" else BLOCK)
        of = model.architecture
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        _check_sizes(of, self.threads)
        self._library = _library(of, Compiler(compiler), flags)
        self.lanes = self._library.engine_lanes().decode()
        sizes = [sum(map(self._matrix_bytes, _matrices_of(layer))) for layer in model.layers]
        always = sum(self._matrix_bytes(tensor) for tensor in _outer_matrices(model))
        memory = parse_size(weights_memory, "weights_memory") if isinstance(weights_memory, str) else weights_memory
        kept = len(sizes) if memory is None else kept_layers(memory, always, sizes)
        self._buffer = max(sizes) if kept < len(sizes) else 0  # bytes of a layer that does not stay in memory
        self._resident = always + sum(sizes[:kept])
        shape = _Shape(
            of.layers, of.width, of.heads, of.kv_heads, of.hidden, of.vocabulary, of.rope.size,
            of.rope.pairs == "adjacent", of.epsilon, CACHES[kv], self.blocks.number, rows,
            self.blocks.number * self.blocks.size, self.threads,
            self._resident + 2 * self._buffer,
            of.query_scale, of.score_cap, of.logit_cap, of.embedding_scale, of.activation == "gelu", of.parallel,
        )  # fmt: skip
        self._weights: int = always + sum(sizes) - self._embedding_only(model)
        self.bytes = shape.weight_bytes + self.blocks.number * _block_bytes(of, kv)  # of weights and cache
        _check_memory(self.bytes, shape.weight_bytes, blocks)
        self._process = os.getpid()
        self._pointer: int | None = self._library.engine_new(ctypes.byref(shape))
        if not self._pointer:
            raise EdgekitError(
                f"no memory for {blocks} blocks of {BLOCK} tokens, or for a thread; ask for fewer blocks"
            )
        self._model = model
        self._load(kept)
        streamed = range(kept, of.layers)
        self._stream = LayerStream(streamed, self._load_streamed) if streamed else None
        self._block_bytes: int = self._library.engine_block_bytes(self._engine)
        self._tails = Tails(self._library.engine_tail_bytes(self._engine), INT4_BLOCK) if kv == "int4" else None

    def close(self) -> None:
        """Free the engine's memory and end its threads."""
        if self._pointer and self._process == os.getpid():
            if (stream := getattr(self, "_stream", None)) is not None:
                stream.close()
            self._library.engine_end(self._pointer)
        self._pointer = None

    @property
    def _engine(self) -> int:
        return owned(self._pointer, self._process)

    def bytes_read(self, context: int) -> int:
        return self._weights + self.blocks.count(context + 1) * self._block_bytes

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self.close()

    def _load(self, kept: int) -> None:
        """Load all weights but the matrices of layers from `kept` on."""
        model = self._model
        self._matrix(-1, 0, model.embedding)
        if model.head is model.embedding:
            self._library.engine_matrix(self._engine, -1, 1, 0, 0, 0)
        else:
            self._matrix(-1, 1, model.head)
        for role, vector in enumerate((model.norm, model.norm_bias, model.head_bias)):
            if vector is not None:
                self._vector(-1, role, vector)
        for number, layer in enumerate(model.layers):
            of = self.architecture
            self._library.engine_view(self._engine, number, of.window(number), of.rope_number(number))
            if number < kept:
                self._load_matrices(number)
            for role, name in enumerate(VECTORS):
                if (tensor := getattr(layer, name)) is not None:
                    self._vector(number, role, tensor)

    def _load_matrices(self, number: int) -> None:
        for role, name in enumerate(MATRICES):
            if (tensor := getattr(self._model.layers[number], name)) is not None:
                self._matrix(number, role, tensor)

    def _load_streamed(self, number: int, buffer: int) -> None:
        self._library.engine_place(self._engine, self._resident + buffer * self._buffer)
        self._load_matrices(number)

    def _matrix_bytes(self, tensor: Tensor) -> int:
        size: int = self._library.engine_matrix_bytes(FORMATS[self._stored(tensor)], *tensor.shape)
        return size

    def _stored(self, tensor: Tensor) -> str:
        """Return the format in which the engine stores a matrix. Formats of more bits than 4 that it does not have
        become Q8_0: nothing is lost that 8 bits do not lose."""
        name = tensor.format.name
        return "Q8_0" if name not in FORMATS or (self._floats_to_q8_0 and tensor.format.values == 1) else name

    def _embedding_only(self, model: Model) -> int:
        """Return the bytes of the embedding if it is not the head, too: a token reads one row of it."""
        return 0 if model.head is model.embedding else self._matrix_bytes(model.embedding)

    def _matrix(self, layer: int, role: int, tensor: Tensor) -> None:
        form = self._stored(tensor)
        done = self._library.engine_matrix(self._engine, layer, role, FORMATS[form], *tensor.shape)
        assert done
        first = 0
        for part in _parts(tensor):
            blocks = nearest("Q8_0", part.values()) if form != tensor.format.name else np.ascontiguousarray(part.rows())
            self._library.engine_rows(
                self._engine, layer, role, first, len(blocks), blocks.ctypes.data, blocks.shape[1]
            )
            first += len(blocks)
            if self._buffer:
                release_pages(part.content)

    def _vector(self, layer: int, role: int, tensor: Tensor) -> None:
        values = np.pad(tensor.values(), (0, -tensor.shape[0] % 16))
        if not self._library.engine_vector(self._engine, layer, role, values.ctypes.data, values.size):
            raise EdgekitError(f"no memory for {tensor.name!r}")
        if self._buffer:
            release_pages(tensor.content)

    # --- the engine's part of the step protocol

    def begin(self, batch: Batch) -> Any:
        """Return the arrays of a step, as C takes them, and what keeps them in memory."""
        angles = [rope.cosines_and_sines(batch.positions) for rope in self.architecture.ropes]
        cosines, sines = (np.concatenate(part) for part in zip(*angles, strict=True))
        follows = np.zeros(len(batch.ids), np.uint8)
        tables = np.zeros(len(batch.ids), np.uintp)
        for span, table in zip(batch.spans, batch.tables, strict=True):
            follows[span] = 1
            follows[span.start] = 0
            tables[span] = table.ctypes.data
        arrays: dict[str, Any] = {
            "ids": batch.ids.astype(np.int32),
            "embeddings": batch.embeddings,
            "cosines": cosines.astype(np.float32),
            "sines": sines.astype(np.float32),
            "index": batch.index.astype(np.int32),
            "tables": tables,
            "tails": None,
            "follows": follows,
        }
        addresses = self._addresses_of_tails(batch)
        if addresses:
            arrays["tails"] = np.zeros(len(batch.ids), np.uintp)
            for span, found in zip(batch.spans, addresses, strict=True):
                arrays["tails"][span] = found.ctypes.data
        pointers = {name: None if array is None else array.ctypes.data for name, array in arrays.items()}
        return _Batch(rows=len(batch.ids), **pointers), (arrays, addresses)

    def _addresses_of_tails(self, batch: Batch) -> list[npt.NDArray[Any]]:
        """Return the addresses of the tails of each item's sequence, which this step writes to."""
        if self._tails is None:
            return []
        found = []
        for sequence, span, table in zip(batch.sequences, batch.spans, batch.tables, strict=True):
            self._tails.extend(sequence, int(batch.index[span.start]), span.stop - span.start)
            found.append(self._tails.addresses(sequence, len(table)))
        return found

    def run_layers(self, state: Any, batch: Batch, first: int, end: int) -> None:
        if self._stream is None:
            self._library.engine_layers(self._engine, ctypes.byref(state[0]), first, end)
            return
        for number in range(first, end):
            self._stream.ready(number)
            self._library.engine_layers(self._engine, ctypes.byref(state[0]), number, number + 1)

    def finish(self, state: Any, batch: Batch) -> Floats:
        vocabulary = self.architecture.vocabulary
        logits = np.empty((len(batch.wanted), -(-vocabulary // 16) * 16), np.float32)
        wanted = batch.wanted.astype(np.int32)
        if len(wanted):
            self._library.engine_logits(self._engine, wanted.ctypes.data, len(wanted), logits.ctypes.data)
        return logits[:, :vocabulary]

    # --- the tails of a cache in 4 bits

    def commit(self, items: Sequence[Item], batch: Batch) -> None:
        super().commit(items, batch)
        for item in items:
            if self._tails is not None:
                self._tails.settle(item.sequence, self.length(item.sequence))

    def fork(self, sequence: int, new: int) -> None:
        super().fork(sequence, new)
        if self._tails is not None:
            self._tails.fork(sequence, new)
            self._tails.settle(new, self.length(new))

    def truncate(self, sequence: int, length: int) -> int:
        if self._tails is not None and 0 <= length < self.length(sequence):
            length = self._tails.kept(sequence, length)
        super().truncate(sequence, length)
        if self._tails is not None:
            self._tails.settle(sequence, length)
        return length

    def remove(self, sequence: int) -> None:
        super().remove(sequence)
        if self._tails is not None:
            self._tails.remove(sequence)

    def save(self, sequence: int) -> Saved:
        saved = super().save(sequence)
        if self._tails is None:
            return saved
        return replace(saved, tail=self._tails.content(sequence, self.length(sequence)))

    def restore(self, sequence: int, saved: Saved) -> None:
        super().restore(sequence, saved)
        if self._tails is not None:
            self._tails.write(sequence, len(saved.inputs), saved.tail)

    # --- blocks in memory

    def copy_block(self, source: int, target: int) -> None:
        self._library.engine_copy_block(self._engine, source, target)

    def export_blocks(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        content = np.empty((len(blocks), self._block_bytes), np.uint8)
        for block, row in zip(blocks.tolist(), content, strict=True):
            self._library.engine_move_block(self._engine, block, row.ctypes.data, 1)
        return content

    def import_blocks(self, blocks: npt.NDArray[np.int32], content: npt.NDArray[Any]) -> None:
        for block, row in zip(blocks.tolist(), np.ascontiguousarray(content), strict=True):
            self._library.engine_move_block(self._engine, block, row.ctypes.data, 0)


def _block_bytes(of: Architecture, kv: str) -> int:
    """Return the bytes of a block of the cache in all layers."""
    size = of.head_size
    head = {
        "f16": 2 * BLOCK * size * 2,
        "int8": 2 * BLOCK * (size + 4),
        "int4": INT4_BLOCK * size + 4 * size + 4 * INT4_BLOCK,  # codes; scales and minimums of keys, and of values
    }
    return of.layers * of.kv_heads * head[kv]


def _check_memory(needed: int, weights: int, blocks: int) -> None:
    _, free = memory_bytes()
    if free and needed > free:
        raise EdgekitError(
            f"{needed:,} bytes are needed, {weights:,} for weights and {needed - weights:,} for a cache of "
            f"{blocks * BLOCK:,} tokens, and {free:,} are free; take a shorter context or a smaller model"
        )


def _check_sizes(of: Architecture, threads: int) -> None:
    queries = of.heads * of.head_size
    limits = [
        (
            of.head_size % 16 == 0 and of.head_size <= 256,
            f"head size {of.head_size}",
            "a multiple of 16 to 256",
        ),
        (of.queries_per_key <= MOST_QUERIES, f"{of.queries_per_key} queries to a key", f"at most {MOST_QUERIES}"),
        (
            not any(size % GROUP for size in (of.width, of.hidden, queries)),
            f"width {of.width}, hidden {of.hidden} and {queries} values of all heads",
            f"multiples of {GROUP}",
        ),
        (1 <= threads <= 256, f"threads = {threads}", "1 to 256"),
    ]
    for good, got, expected in limits:
        if not good:
            raise EdgekitError(f"the native engine cannot run this: {got}; expected {expected}; the torch engine can")


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a matrix in parts of some rows, so that no more than a part of it is in memory as float32."""
    rows = max(1, PART_VALUES // tensor.shape[1])
    for first in range(0, tensor.shape[0], rows):
        yield tensor.part(first, min(first + rows, tensor.shape[0]))


def _outer_matrices(model: Model) -> list[Tensor]:
    return [model.embedding] if model.head is model.embedding else [model.embedding, model.head]


def _matrices_of(layer: Layer) -> list[Tensor]:
    return [tensor for name in MATRICES if (tensor := getattr(layer, name)) is not None]


def source_of(of: Architecture) -> str:
    """Return the C source of an engine for this architecture, in one file."""
    parts = [f"#define HEAD_SIZE {of.head_size}\n#define QUERIES {of.queries_per_key}\n"]
    parts += [re.sub(r'^#include "[^"]*"\n', "", (FOLDER / name).read_text(), flags=re.M) for name in FILES]
    return "".join(parts)


def _library(of: Architecture, compiler: Compiler, flags: Sequence[str]) -> ctypes.CDLL:
    """Return the compiled engine from the cache, or compile it now."""
    every = (*FLAGS, *flags)
    source = source_of(of)
    key = hashlib.sha256(f"{source}\0{' '.join(every)}\0{compiler.macros(every)}".encode()).hexdigest()[:32]
    path = cache.folder("llm") / f"{key}.so"
    if not is_complete(path):
        keep_library(path, compiler.shared_library(source, "", every))
    library = ctypes.CDLL(str(path))
    pointer, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    for name, result, arguments in (
        ("engine_lanes", ctypes.c_char_p, []),
        ("engine_new", pointer, [pointer]),
        ("engine_end", None, [pointer]),
        ("engine_view", None, [pointer, number, number, number]),
        ("engine_vector", number, [pointer, number, number, pointer, number]),
        ("engine_matrix_bytes", size, [number, number, number]),
        ("engine_matrix", number, [pointer, number, number, number, number, number]),
        ("engine_rows", None, [pointer, number, number, number, number, pointer, size]),
        ("engine_place", None, [pointer, size]),
        ("engine_layers", None, [pointer, pointer, number, number]),
        ("engine_logits", None, [pointer, pointer, number, pointer]),
        ("engine_block_bytes", size, [pointer]),
        ("engine_tail_bytes", size, [pointer]),
        ("engine_move_block", None, [pointer, number, pointer, number]),
        ("engine_copy_block", None, [pointer, number, number]),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
