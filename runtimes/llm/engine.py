"""The step protocol of language models: new tokens of several sequences in, the logits that are wanted out.

A step takes a ragged batch: each item appends tokens (or embeddings) to one sequence. Chunks of prompts and single
tokens of answers are the same to it. A step can be done a few layers at a time, so that other work need not wait for
the whole step; the sequences are unchanged until its last layer is done, and a step that is given up changes nothing.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from runtimes.llm.architecture import Architecture
from runtimes.llm.blocks import BLOCK, Blocks

Wanted = Literal["none", "last", "all"]
Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
MOST_BLOCKS, MOST_ROWS = 1 << 26, 1 << 16  # sizes that 32-bit numbers count safely in C


@dataclass(frozen=True, slots=True)
class Item:
    """Tokens to append to a sequence, which begins with its first item.

    inputs: (tokens,) int64 ids, or (tokens, width) float32 embeddings, as vision models give them. positions: (tokens,)
    for the rotary embedding; by default those after the tokens that the sequence has. logits: of which of these tokens.
    """

    sequence: int
    inputs: Ids | Floats
    positions: Ids | None = None
    logits: Wanted = "last"


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step, all items one after another.

    ids: (rows,) the token, or -1 where `embeddings` (rows, width) has the input; embeddings is None if there are none.
    positions: (rows,); index: (rows,) of each token in its sequence; sequences: of each item; spans: the rows of each
    item; tables: the blocks of each item's sequence; wanted: (rows with logits,).
    """

    ids: Ids
    embeddings: Floats | None
    positions: Ids
    index: Ids
    sequences: Sequence[int]
    spans: Sequence[slice]
    tables: Sequence[npt.NDArray[np.int32]]
    wanted: Ids


@dataclass(frozen=True, slots=True)
class Saved:
    """A sequence out of its engine: its tokens' inputs, and the content of its blocks. An engine of the same class and
    the same model takes it back."""

    inputs: Sequence[bytes]
    content: npt.NDArray[Any]
    tail: bytes = b""  # of a block that is not full, where an engine keeps it apart


class Step:
    """A step that has begun. `advance` runs layers; `logits` gives the result after the last one. The engine's next
    step ends it: an engine has memory for the activations of one step."""

    def __init__(self, engine: Engine, items: Sequence[Item], batch: Batch) -> None:
        self._engine, self._items, self._batch = engine, items, batch
        self._state = engine.begin(batch)
        self._number = engine.steps
        self.layer = 0  # the next one to run

    @property
    def done(self) -> bool:
        return self.layer == self._engine.architecture.layers

    def advance(self, layers: int = 1) -> bool:
        """Run up to this many layers; return whether all are done. Between two calls the caller may do anything but
        change a sequence of this engine."""
        self._check_current()
        if layers < 1:
            raise EdgekitError(f"advance by {layers} layers; expected at least 1")
        last = self._engine.architecture.layers
        if self.layer < last:
            end = min(self.layer + layers, last)
            self._engine.run_layers(self._state, self._batch, self.layer, end)
            self.layer = end
            if end == last:
                self._engine.commit(self._items, self._batch)
        return self.layer == last

    def logits(self) -> list[Floats]:
        """Return (tokens with logits, vocabulary) for each item."""
        self._check_current()
        assert self.done
        rows = self._engine.finish(self._state, self._batch)
        ends = np.cumsum([_rows_wanted(item) for item in self._items])
        return np.split(rows, ends[:-1].tolist())

    def _check_current(self) -> None:
        if self._number != self._engine.steps:
            raise EdgekitError("this step was given up, because the engine has begun another one; begin it again")


class Engine(ABC):
    """A model with the key-value cache of its sequences, of `blocks` times 16 tokens. rows: the most tokens of a step;
    block: tokens to a block of the cache.

    A subclass computes: `begin` makes a step's state, `run_layers` runs layers on it and writes keys and values, and
    `finish` computes logits. It also copies, exports and imports blocks.
    """

    divisible = True  # whether a step can stop between two layers

    def __init__(self, architecture: Architecture, blocks: int, rows: int = MOST_ROWS, block: int = BLOCK) -> None:
        for name, value, most in (("blocks", blocks, MOST_BLOCKS), ("rows", rows, MOST_ROWS)):
            if not 1 <= value <= most:
                raise EdgekitError(f"{name} = {value}; expected 1 to {most} ({BLOCK} tokens to a block)")
        self.architecture, self.rows = architecture, rows
        self.steps = 0  # that have begun
        self.blocks = Blocks(-(-blocks * BLOCK // block), self.copy_block, block)

    def step(self, items: Sequence[Item], between: Callable[[int], None] | None = None) -> list[Floats]:
        """Append the items' tokens; return (tokens with logits, vocabulary) for each item. between: called after each
        layer but the last one, with the number of layers that are done. If it raises, nothing has changed.

        Raises NoBlocksError before anything is computed if the cache is full.
        """
        step = self.start(items)
        while not step.advance(1 if between else self.architecture.layers):
            assert between is not None
            between(step.layer)
        return step.logits()

    def start(self, items: Sequence[Item]) -> Step:
        """Begin a step, of which the caller runs the layers. A step that is still open is given up."""
        seen = set()
        for item in items:
            if item.sequence in seen:
                raise EdgekitError(f"sequence {item.sequence} is in this step twice; put its tokens into one item")
            seen.add(item.sequence)
            self.check(item)
        tokens = sum(len(item.inputs) for item in items)
        if not items:
            raise EdgekitError("a step needs at least one item")
        if tokens > self.rows:
            raise EdgekitError(f"a step of {tokens} tokens; this engine takes up to {self.rows}, set with rows=")
        self.blocks.reserve([(item.sequence, len(item.inputs)) for item in items])
        self.steps += 1
        return Step(self, items, self._batch(items))

    @abstractmethod
    def close(self) -> None:
        """Free what the engine has. It cannot be used any more."""

    def bytes_read(self, context: int) -> int | None:
        """Return the bytes of memory that a step with one token behind `context` others reads; None if unknown."""
        return None

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence has; 0 for one that has not begun."""
        return self.blocks.length(sequence)

    def reuse(self, sequence: int, ids: Ids) -> int:
        """Begin a sequence with what the cache still has of these tokens; return how many that are. Append the rest."""
        return self.blocks.adopt(sequence, [input_key(token, position) for position, token in enumerate(ids.tolist())])

    def fork(self, sequence: int, new: int) -> None:
        """Begin a new sequence with all tokens of another one. Both share memory until one of them writes."""
        self.blocks.fork(sequence, new)

    def truncate(self, sequence: int, length: int) -> int:
        """Take tokens back: keep the first `length` of a sequence. Return how many are kept: an engine whose cache has
        lost what it takes to go on there keeps fewer, and the rest must be appended again."""
        self.blocks.truncate(sequence, length)
        return length

    def remove(self, sequence: int) -> None:
        """End a sequence and free its memory."""
        self.blocks.remove(sequence)

    def save(self, sequence: int) -> Saved:
        """Return a copy of a sequence's state."""
        table = self.blocks.array(sequence)[: self.blocks.count(self.length(sequence))]
        return Saved(tuple(self.blocks.inputs(sequence)), self.export_blocks(table))

    def restore(self, sequence: int, saved: Saved) -> None:
        """Begin a sequence with a saved state. Raises NoBlocksError if the cache is full."""
        if sequence in self.blocks.tables:
            raise EdgekitError(f"sequence {sequence} exists already; restore to a new one")
        empty = self.export_blocks(np.empty(0, np.int32))
        found, expected = saved.content, (self.blocks.count(len(saved.inputs)), *empty.shape[1:])
        if found.shape != expected or found.dtype != empty.dtype:
            raise EdgekitError(
                f"the saved state is {found.dtype} of shape {found.shape}, and this engine's is {empty.dtype} of shape "
                f"{expected}; restore it to an engine of the same model, class and cache format"
            )
        self.blocks.reserve([(sequence, len(saved.inputs))])
        self.import_blocks(self.blocks.array(sequence), saved.content)
        self.blocks.append(sequence, saved.inputs)

    def commit(self, items: Sequence[Item], batch: Batch) -> None:
        """Note that the tokens of a step are in the cache."""
        for item, span in zip(items, batch.spans, strict=True):
            positions = batch.positions[span].tolist()
            if item.inputs.ndim == 1:
                found = [input_key(token, at) for token, at in zip(item.inputs.tolist(), positions, strict=True)]
            else:
                digests = [hashlib.sha256(row.tobytes()).digest() for row in item.inputs]
                found = [digest + input_key(-1, at) for digest, at in zip(digests, positions, strict=True)]
            self.blocks.append(item.sequence, found)

    # --- what a subclass computes

    @abstractmethod
    def begin(self, batch: Batch) -> Any:
        """Return the state of a step: (rows, width) the inputs of the first layer, and what else it needs."""

    @abstractmethod
    def run_layers(self, state: Any, batch: Batch, first: int, end: int) -> None:
        """Run the layers from `first` to before `end`."""

    @abstractmethod
    def finish(self, state: Any, batch: Batch) -> Floats:
        """Return (rows with logits, vocabulary)."""

    @abstractmethod
    def copy_block(self, source: int, target: int) -> None:
        """Copy a block's keys and values in all layers."""

    @abstractmethod
    def export_blocks(self, blocks: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
        """Return a copy of the content of blocks; the first axis is the block."""

    @abstractmethod
    def import_blocks(self, blocks: npt.NDArray[np.int32], content: npt.NDArray[Any]) -> None:
        """Write such a copy into blocks."""

    # --- checks

    def check(self, item: Item) -> None:
        """Raise if an item cannot be computed, whatever else a step has."""
        shape, vocabulary = item.inputs.shape, self.architecture.vocabulary
        ids = item.inputs.ndim == 1 and item.inputs.dtype == np.int64
        embeddings = item.inputs.ndim == 2 and item.inputs.dtype == np.float32
        if not (ids or (embeddings and shape[1] == self.architecture.width)) or not shape[0]:
            raise EdgekitError(
                f"sequence {item.sequence}: inputs are {item.inputs.dtype} of shape {shape}; expected (tokens,) int64 "
                f"ids or (tokens, {self.architecture.width}) float32 embeddings, and at least one token"
            )
        if ids and (item.inputs.min() < 0 or item.inputs.max() >= vocabulary):
            raise EdgekitError(f"sequence {item.sequence}: a token id is outside 0 to {vocabulary - 1}")
        if embeddings and not np.isfinite(item.inputs).all():
            raise EdgekitError(f"sequence {item.sequence}: embeddings hold NaN or infinite values")
        first = self.length(item.sequence)
        last = first + shape[0] - 1
        if item.positions is not None:
            if item.positions.dtype != np.int64 or item.positions.shape != shape[:1]:
                raise EdgekitError(
                    f"sequence {item.sequence}: positions are {item.positions.dtype} of shape {item.positions.shape} "
                    f"for {shape[0]} tokens; expected one for each token, int64"
                )
            first, last = int(item.positions.min()), int(item.positions.max())
        if first < 0 or last >= self.architecture.context:
            raise EdgekitError(
                f"sequence {item.sequence}: positions from {first} to {last}; expected 0 to "
                f"{self.architecture.context - 1}, which is the model's context"
            )

    def _batch(self, items: Sequence[Item]) -> Batch:
        lengths = [len(item.inputs) for item in items]
        ends = np.cumsum(lengths).tolist()
        spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        ids = np.full(ends[-1], -1, np.int64)
        embeddings: Floats | None = None
        for item, span in zip(items, spans, strict=True):
            if item.inputs.ndim == 1:
                ids[span] = item.inputs
            else:
                if embeddings is None:
                    embeddings = np.zeros((ends[-1], self.architecture.width), np.float32)
                embeddings[span] = item.inputs
        starts = [self.length(item.sequence) for item in items]
        index = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        wanted = [np.arange(span.stop - _rows_wanted(item), span.stop) for item, span in zip(items, spans, strict=True)]
        return Batch(
            ids,
            embeddings,
            np.concatenate(
                [at if item.positions is None else item.positions for item, at in zip(items, index, strict=True)]
            ),
            np.concatenate(index),
            [item.sequence for item in items],
            spans,
            [self.blocks.array(item.sequence) for item in items],
            np.concatenate(wanted),
        )


def owned(pointer: int | None, process: int) -> int:
    """Return the pointer to an engine in C that the process with this number has made. Raises EdgekitError if the
    engine was closed, and in a process that was forked: it has a copy of the engine's memory, and none of its
    threads."""
    if pointer is None:
        raise EdgekitError("this engine was closed; load the model again")
    if process != os.getpid():
        raise EdgekitError(
            f"this engine belongs to process {process}, and its threads do not follow a fork; load the model again in "
            "this process"
        )
    return pointer


def _rows_wanted(item: Item) -> int:
    return {"none": 0, "last": 1, "all": len(item.inputs)}[item.logits]


def input_key(token: int, position: int) -> bytes:
    """Return what the keys and values of a token depend on beside the tokens before it."""
    return token.to_bytes(8, "little", signed=True) + position.to_bytes(8, "little")
