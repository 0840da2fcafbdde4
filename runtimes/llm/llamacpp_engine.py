"""llama.cpp behind the step protocol, for GPUs and for machines without a C compiler.

The library's own memory holds keys and values; the blocks here only count its cells. What it cannot do is refused in
one line: positions with gaps, and other work between two layers. Its results depend on the batch in the last bits, so a
near tie between two tokens may end differently in another schedule.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, unknown
from edgekit.importers.gguf import Tensor
from edgekit.machine import memory_bytes
from runtimes.llm import llamacpp_library
from runtimes.llm.architecture import Layer, Model
from runtimes.llm.blocks import BLOCK
from runtimes.llm.engine import Batch, Engine, Floats, Ids, Item, Saved, Step, input_key, owned
from runtimes.llm.llamacpp_library import CONTEXT, MODEL, MOST_SEQUENCES, OFFLOAD, UNIFIED, Library, Struct
from runtimes.llm.llamacpp_library import Batch as Rows

CACHES = {"f16": (1, 2.0), "q8_0": (8, 34 / 32), "q4_0": (2, 18 / 32)}  # ggml's number, and bytes of a value
CELLS = 256  # llama.cpp rounds its context up to a multiple
AUTO, OFF, ON = -1, 0, 1  # flash attention


class LlamaCppEngine(Engine):
    """A model in a library of llama.cpp. blocks: of 16 tokens, of the cache; kv: "f16", "q8_0" or "q4_0"; threads: by
    default one for each core; rows: the most tokens of a step; gpu_layers: how many layers run on the GPU, -1 for all;
    sequences: the most at a time, by default as many as blocks, up to the library's limit; flash_attention: by default
    llama.cpp chooses; shared: all sequences share one cache; otherwise each has its part of it, which is faster for
    many of them; library: a file or a folder, by default $EDGEKIT_LLAMACPP or xllamacpp."""

    divisible = False

    def __init__(
        self,
        model: Model,
        *,
        blocks: int = 512,
        kv: str = "f16",
        threads: int | None = None,
        rows: int = 512,
        gpu_layers: int = 0,
        sequences: int | None = None,
        flash_attention: bool | None = None,
        shared: bool = True,
        library: str | Path | None = None,
    ) -> None:
        if kv not in CACHES:
            raise unknown("format of llama.cpp's key-value cache", kv, CACHES)
        if model.path is None or model.path.suffix != ".gguf":
            raise EdgekitError("llama.cpp reads .gguf files alone; use the native or the torch engine for this model")
        super().__init__(model.architecture, blocks, rows)
        self.threads = len(os.sched_getaffinity(0)) if threads is None else threads
        self.library = llamacpp_library.opened(llamacpp_library.find(library))
        self._c = self.library.c
        self.sequences = min(blocks, MOST_SEQUENCES) if sequences is None else sequences
        for name, value, limit in (("threads", self.threads, 256), ("sequences", self.sequences, MOST_SEQUENCES)):
            if not 1 <= value <= limit:
                raise EdgekitError(f"{name} = {value}; expected 1 to {limit}")
        if gpu_layers and not self._c.llama_supports_gpu_offload():
            raise EdgekitError(
                f"gpu_layers = {gpu_layers}, and {self.library.path.name} is a build for the CPU alone; expected 0, or "
                f"set {llamacpp_library.VARIABLE} to the folder of a build for the GPU"
            )
        self._token_bytes = self._cache_bytes_of_a_token(kv)
        self._weights = sum(tensor.rows().nbytes for tensor in _read_for_a_token(model))
        if not gpu_layers:
            self._check_memory(blocks)
        self._shared, self._kv = shared, kv
        self._numbers: dict[int, int] = {}  # llama.cpp's number of each sequence
        self._unused = list(range(self.sequences))[::-1]
        self._process = os.getpid()
        self._pointer: int | None = None
        self._model = self._load(model.path, gpu_layers)
        self._pointer = self._new_context(kv, flash_attention)

    # --- the model and its context

    def _load(self, path: Path, gpu_layers: int) -> int:
        parameters = self._c.llama_model_default_params()
        parameters.put(MODEL["gpu_layers"][0], gpu_layers)
        model: int | None = self._c.llama_model_load_from_file(os.fsencode(path), parameters)
        if not model:
            raise self.library.failure(f"cannot load {path}")
        tokens = self._c.llama_vocab_n_tokens(self._c.llama_model_get_vocab(model))
        if tokens != self.architecture.vocabulary:
            self._c.llama_model_free(model)
            raise EdgekitError(f"{path}: llama.cpp finds {tokens} tokens, edgekit {self.architecture.vocabulary}")
        return model

    def _new_context(self, kv: str, flash_attention: bool | None) -> int:
        parts = 1 if self._shared else self.sequences
        cells = -(-self.blocks.number * BLOCK // (CELLS * parts)) * CELLS * parts
        sizes = {
            "context": cells, "batch": min(self.rows, cells), "microbatch": min(self.rows, cells, 512),
            "sequences": self.sequences,
            "threads": self.threads, "batch_threads": self.threads, "keys": CACHES[kv][0], "values": CACHES[kv][0],
            "flash_attention": AUTO if flash_attention is None else ON if flash_attention else OFF,
        }  # fmt: skip
        parameters: Struct = self._c.llama_context_default_params()
        for name, value in sizes.items():
            parameters.put(CONTEXT[name][0], value)
        parameters.content[self.library.layout.flags + UNIFIED] = self._shared
        assert parameters.content[self.library.layout.flags + OFFLOAD]
        context: int | None = self._c.llama_init_from_model(self._model, parameters)
        if not context:
            self._c.llama_model_free(self._model)
            raise self.library.failure(f"cannot make a context of {cells} tokens in {kv}")
        asked = {"context": "ctx", "batch": "batch", "microbatch": "ubatch", "sequences": "seq_max"}
        asked |= {"threads": "threads", "batch_threads": "threads_batch"}
        got = {name: getattr(self._c, f"llama_n_{short}")(context) for name, short in asked.items()}
        if got != {name: sizes[name] for name in asked}:
            self._c.llama_free(context)
            self._c.llama_model_free(self._model)
            raise EdgekitError(f"{self.library.path}: it was told {sizes} and has {got}; {llamacpp_library.INSTALL}")
        return context

    def _cache_bytes_of_a_token(self, kv: str) -> float:
        of = self.architecture
        return 2 * of.layers * of.kv_heads * of.head_size * CACHES[kv][1]

    def _check_memory(self, blocks: int) -> None:
        cache, (_, free) = int(blocks * BLOCK * self._token_bytes), memory_bytes()
        if free and cache + self._weights > free:
            raise EdgekitError(
                f"{cache + self._weights:,} bytes are needed, {self._weights:,} for weights and {cache:,} for a cache "
                f"of {blocks * BLOCK:,} tokens, and {free:,} are free; take a shorter context or a smaller model"
            )

    @property
    def _context(self) -> int:
        return owned(self._pointer, self._process)

    @property
    def _memory(self) -> int:
        """The keys and values in llama.cpp."""
        memory: int = self._c.llama_get_memory(self._context)
        return memory

    def close(self) -> None:
        """Free llama.cpp's context and model."""
        if self._pointer and self._process == os.getpid():
            self._c.llama_free(self._pointer)
            self._c.llama_model_free(self._model)
        self._pointer = None

    def __del__(self) -> None:
        if getattr(self, "_pointer", None):
            self.close()

    def bytes_read(self, context: int) -> int:
        return self._weights + int((context + 1) * self._token_bytes)

    # --- steps

    def start(self, items: Sequence[Item]) -> Step:
        self._check_room({item.sequence for item in items} - self._numbers.keys())
        return super().start(items)

    def check(self, item: Item) -> None:
        super().check(item)
        first, tokens = self.length(item.sequence), len(item.inputs)
        if item.positions is not None and not np.array_equal(item.positions, np.arange(first, first + tokens)):
            raise EdgekitError(
                f"sequence {item.sequence}: llama.cpp takes the positions {first} to {first + tokens - 1} here and no "
                "others; use the native or the torch engine"
            )
        most = self.blocks.number * BLOCK // (1 if self._shared else self.sequences)
        if not self._shared and first + tokens > most:
            raise EdgekitError(f"sequence {item.sequence} of {first + tokens} tokens; each has a cache of {most}")

    def begin(self, batch: Batch) -> Any:
        """Return where the logits of a step go."""
        for sequence in batch.sequences:
            if sequence not in self._numbers:
                self._numbers[sequence] = self._unused.pop()
        return np.empty((len(batch.wanted), self.architecture.vocabulary), np.float32)

    def run_layers(self, state: Any, batch: Batch, first: int, end: int) -> None:
        if (first, end) != (0, self.architecture.layers):
            raise EdgekitError(
                "llama.cpp runs all layers of a step at once; use the native or the torch engine to stop between them"
            )
        numbers = np.empty(len(batch.ids), np.int32)
        for sequence, span in zip(batch.sequences, batch.spans, strict=True):
            numbers[span] = self._numbers[sequence]
        tokens = batch.ids >= 0
        try:
            for rows in filter(len, (np.flatnonzero(tokens), np.flatnonzero(~tokens))):  # a call takes one of the two
                self._decode(state, batch, rows, numbers[rows])
        except EdgekitError:
            for sequence in batch.sequences:  # what a call has computed before another one failed
                self._c.llama_memory_seq_rm(self._memory, self._numbers[sequence], self.length(sequence), -1)
            raise

    def _decode(self, logits: Floats, batch: Batch, rows: Ids, numbers: npt.NDArray[np.int32]) -> None:
        """Run one call of llama.cpp, and copy the logits that are wanted of its rows."""
        wanted = np.isin(rows, batch.wanted)
        arrays: dict[str, npt.NDArray[Any]] = {
            "positions": batch.positions[rows].astype(np.int32),
            "counts": np.ones(len(rows), np.int32),
            "sequences": numbers.ctypes.data + np.arange(len(rows), dtype=np.uintp) * numbers.itemsize,
            "logits": wanted.astype(np.int8),
        }
        if batch.ids[rows[0]] >= 0:
            arrays["tokens"] = batch.ids[rows].astype(np.int32)
        else:
            assert batch.embeddings is not None
            arrays["embeddings"] = np.ascontiguousarray(batch.embeddings[rows])
        pointers = {name: array.ctypes.data for name, array in arrays.items()}
        status = self._c.llama_decode(self._context, Rows(number=len(rows), **pointers))
        if status:
            raise self.library.failure(f"cannot compute {len(rows)} tokens (status {status})")
        self._c.llama_synchronize(self._context)
        if number := int(wanted.sum()):
            address = ctypes.cast(self._c.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
            found = np.ctypeslib.as_array(address, (number, logits.shape[1]))
            logits[np.isin(batch.wanted, rows)] = found  # both in the order of the rows

    def finish(self, state: Any, batch: Batch) -> Floats:
        found: Floats = state
        return found

    # --- sequences

    def _check_room(self, new: set[int]) -> None:
        if len(new) > len(self._unused):
            raise EdgekitError(
                f"{len(self._numbers) + len(new)} sequences at a time; this engine has {self.sequences}, set with "
                "sequences="
            )

    def reuse(self, sequence: int, ids: Ids) -> int:
        """Begin a sequence with what another one that lives has of these tokens; return how many that are."""
        keys = [input_key(token, position) for position, token in enumerate(ids[:-1].tolist())]
        found = [(_common(self.blocks.tables[other].inputs, keys), other) for other in self._numbers]
        shared, source = max(found, default=(0, 0))
        if shared < BLOCK or not self._unused:
            return 0
        self.fork(source, sequence)
        return self.truncate(sequence, shared)

    def fork(self, sequence: int, new: int) -> None:
        self._check_room({new})
        super().fork(sequence, new)
        self._numbers[new] = self._unused.pop()
        self._c.llama_memory_seq_cp(self._memory, self._numbers[sequence], self._numbers[new], -1, -1)

    def truncate(self, sequence: int, length: int) -> int:
        super().truncate(sequence, length)
        number = self._numbers.get(sequence)
        if number is not None and not self._c.llama_memory_seq_rm(self._memory, number, length, -1):
            raise EdgekitError(f"llama.cpp cannot take tokens of a {self.architecture.family} model back; begin again")
        return length

    def remove(self, sequence: int) -> None:
        super().remove(sequence)
        if (number := self._numbers.pop(sequence, None)) is not None:
            self._c.llama_memory_seq_rm(self._memory, number, -1, -1)
            self._unused.append(number)

    def save(self, sequence: int) -> Saved:
        inputs = tuple(self.blocks.inputs(sequence))
        number = self._numbers.get(sequence)
        if number is None:
            return Saved(inputs, np.empty((0, 1), np.uint8), self._signature)
        content = np.empty((1, self._c.llama_state_seq_get_size(self._context, number)), np.uint8)
        written = self._c.llama_state_seq_get_data(self._context, content.ctypes.data, content.size, number)
        return Saved(inputs, content[:, :written], self._signature)

    def restore(self, sequence: int, saved: Saved) -> None:
        if sequence in self.blocks.tables:
            raise EdgekitError(f"sequence {sequence} exists already; restore to a new one")
        if saved.tail != self._signature:
            raise EdgekitError(
                f"the saved state is {saved.content.dtype} of shape {saved.content.shape} and not this engine's; "
                "restore it to an engine of the same model, class and cache format"
            )
        self._check_room({sequence})
        self.blocks.reserve([(sequence, len(saved.inputs))])
        self._numbers[sequence] = self._unused.pop()
        content = np.ascontiguousarray(saved.content)
        arguments = (content.ctypes.data, content.size, self._numbers[sequence])
        if content.size and not self._c.llama_state_seq_set_data(self._context, *arguments):
            self.remove(sequence)
            raise self.library.failure("cannot restore a saved sequence")
        self.blocks.append(sequence, saved.inputs)

    @property
    def _signature(self) -> bytes:
        """What must be equal where a sequence is saved and where it is restored."""
        of = self.architecture
        text = f"llama.cpp {of.family} {of.layers} {of.width} {of.kv_heads} {of.head_size} {self._kv}"
        return hashlib.sha256(text.encode()).digest()

    # --- blocks, which are only counted here

    def copy_block(self, source: int, target: int) -> None:
        """Do nothing: sequences share cells of single tokens, and new tokens get cells of their own."""

    def export_blocks(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        raise EdgekitError("llama.cpp gives whole sequences, not blocks; call save")

    def import_blocks(self, blocks: npt.NDArray[np.int32], content: npt.NDArray[Any]) -> None:
        raise EdgekitError("llama.cpp takes whole sequences, not blocks; call restore")


def _common(first: Sequence[bytes], second: Sequence[bytes]) -> int:
    """Return how many of the first inputs are the same."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _read_for_a_token(model: Model) -> Iterator[Tensor]:
    """Yield the weights that every token of an answer reads whole."""
    yield model.head
    for layer in model.layers:
        yield from (found for role in Layer.__slots__ if (found := getattr(layer, role)) is not None)


def described(library: Library) -> str:
    """Return which build this is and what it uses of the CPU."""
    return f"{library.path.name}, {library.instructions}"
