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
from edgekit.errors import EdgekitError, unknown
from edgekit.importers.gguf import Tensor
from edgekit.importers.gguf_encode import nearest
from edgekit.machine import memory_bytes
from exporters.c.library import Compiler, is_complete, keep_library
from runtimes.llm.architecture import Architecture, Model
from runtimes.llm.blocks import BLOCK
from runtimes.llm.engine import Batch, Engine, Floats, Item, Saved
from runtimes.llm.tails import Tails

FOLDER = Path(__file__).parent / "native"
FILES = ("lanes.h", "matrix.c", "attention.c", "attention_int4.c", "layer.c", "engine.c")
# contraction would round differently from compiler to compiler; results are the same bits everywhere without it
FLAGS = ("-std=gnu99", "-O3", "-ffp-contract=off", "-pthread")
FORMATS = {"Q4_0": 0, "Q4_1": 1, "Q8_0": 2, "F16": 3, "BF16": 4, "F32": 5}  # as the C source numbers them
CACHES = {"f16": 0, "int8": 1, "int4": 2}
INT4_BLOCK = 64  # tokens to a block in 4 bits
MATRICES = ("query", "key", "value", "attention_output", "gate", "up", "down")  # in the order of the C source
VECTORS = ("attention_norm", "mlp_norm", "query_bias", "key_bias", "value_bias", "query_norm", "key_norm")
MOST_QUERIES = 16  # to a head of keys
GROUP = 32  # inputs that share a scale


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layers", "width", "heads", "kv_heads", "hidden", "vocabulary")),
        *((name, ctypes.c_int32) for name in ("rope_size", "adjacent")),
        ("epsilon", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("cache", "blocks", "most_rows", "most_length", "threads")),
        ("weight_bytes", ctypes.c_size_t),
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
    $CC or the first of cc, gcc, clang; flags: by default for this machine."""

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
    ) -> None:
        if kv not in CACHES:
            raise unknown("format of the key-value cache", kv, CACHES)
        super().__init__(model.architecture, blocks, rows, INT4_BLOCK if kv == "int4" else BLOCK)
        of = model.architecture
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        _check_sizes(of, self.threads)
        self._library = _library(of, Compiler(compiler), flags)
        self.lanes = self._library.engine_lanes().decode()
        shape = _Shape(
            of.layers, of.width, of.heads, of.kv_heads, of.hidden, of.vocabulary, of.rope.size,
            of.rope.pairs == "adjacent", of.epsilon, CACHES[kv], self.blocks.number, rows,
            self.blocks.number * self.blocks.size, self.threads,
            sum(self._matrix_bytes(tensor) for tensor in _matrices(model)),
        )  # fmt: skip
        self._weights: int = shape.weight_bytes - self._embedding_only(model)
        self.bytes = shape.weight_bytes + self.blocks.number * _block_bytes(of, kv)  # of weights and cache
        _check_memory(self.bytes, shape.weight_bytes, blocks)
        self._process = os.getpid()
        self._pointer: int | None = self._library.engine_new(ctypes.byref(shape))
        if not self._pointer:
            raise EdgekitError(
                f"no memory for {blocks} blocks of {BLOCK} tokens, or for a thread; ask for fewer blocks"
            )
        self._load(model)
        self._block_bytes: int = self._library.engine_block_bytes(self._engine)
        self._tails = Tails(self._library.engine_tail_bytes(self._engine), INT4_BLOCK) if kv == "int4" else None

    def close(self) -> None:
        """Free the engine's memory and end its threads."""
        if self._pointer and self._process == os.getpid():
            self._library.engine_end(self._pointer)
        self._pointer = None

    @property
    def _engine(self) -> int:
        """The engine in C. A process that was forked has a copy of its memory, and none of its threads."""
        if self._pointer is None:
            raise EdgekitError("this engine was closed; load the model again")
        if self._process != os.getpid():
            raise EdgekitError(
                f"this engine belongs to process {self._process}, and its threads do not follow a fork; load the model "
                "again in this process"
            )
        return self._pointer

    def bytes_read(self, context: int) -> int:
        return self._weights + self.blocks.count(context + 1) * self._block_bytes

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self.close()

    def _load(self, model: Model) -> None:
        self._matrix(-1, 0, model.embedding)
        if model.head is model.embedding:
            self._library.engine_matrix(self._engine, -1, 1, 0, 0, 0, None, 0)
        else:
            self._matrix(-1, 1, model.head)
        self._vector(-1, 0, model.norm)
        for number, layer in enumerate(model.layers):
            for role, name in enumerate(MATRICES):
                self._matrix(number, role, getattr(layer, name))
            for role, name in enumerate(VECTORS):
                if (tensor := getattr(layer, name)) is not None:
                    self._vector(number, role, tensor)

    def _matrix_bytes(self, tensor: Tensor) -> int:
        form = FORMATS.get(tensor.format.name, FORMATS["Q8_0"])
        size: int = self._library.engine_matrix_bytes(form, *tensor.shape)
        return size

    def _embedding_only(self, model: Model) -> int:
        """Return the bytes of the embedding if it is not the head, too: a token reads one row of it."""
        return 0 if model.head is model.embedding else self._matrix_bytes(model.embedding)

    def _matrix(self, layer: int, role: int, tensor: Tensor) -> None:
        rows, inputs = tensor.shape
        form = tensor.format.name
        content = np.ascontiguousarray(tensor.rows())
        if form not in FORMATS:  # of more bits than 4: nothing is lost that 8 bits do not lose
            form, content = "Q8_0", nearest("Q8_0", tensor.values())
        done = self._library.engine_matrix(
            self._engine, layer, role, FORMATS[form], rows, inputs, content.ctypes.data, content.shape[1]
        )
        assert done

    def _vector(self, layer: int, role: int, tensor: Tensor) -> None:
        values = np.ascontiguousarray(tensor.values())
        if not self._library.engine_vector(self._engine, layer, role, values.ctypes.data, values.size):
            raise EdgekitError(f"no memory for {tensor.name!r}")

    # --- the engine's part of the step protocol

    def begin(self, batch: Batch) -> Any:
        """Return the arrays of a step, as C takes them, and what keeps them in memory."""
        angles = self.architecture.rope.angles(batch.positions)
        follows = np.zeros(len(batch.ids), np.uint8)
        tables = np.zeros(len(batch.ids), np.uintp)
        for span, table in zip(batch.spans, batch.tables, strict=True):
            follows[span] = 1
            follows[span.start] = 0
            tables[span] = table.ctypes.data
        arrays: dict[str, Any] = {
            "ids": batch.ids.astype(np.int32),
            "embeddings": batch.embeddings,
            "cosines": np.cos(angles).astype(np.float32),
            "sines": np.sin(angles).astype(np.float32),
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
        self._library.engine_layers(self._engine, ctypes.byref(state[0]), first, end)

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


def _matrices(model: Model) -> Iterator[Tensor]:
    yield model.embedding
    if model.head is not model.embedding:
        yield model.head
    for layer in model.layers:
        yield from (getattr(layer, name) for name in MATRICES)


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
        ("engine_vector", number, [pointer, number, number, pointer, number]),
        ("engine_matrix_bytes", size, [number, number, number]),
        ("engine_matrix", number, [pointer, number, number, number, number, number, pointer, size]),
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
