"""Which blocks of the key-value cache hold which tokens: paging, copy on write, and reuse of common beginnings.

A block holds the keys and values of some consecutive tokens, most often `BLOCK`, in all layers. Sequences share blocks:
a fork shares all of its parent's, and a new sequence shares full blocks that another sequence computed from the same
beginning. A shared block is copied before it is written. A full block is found again by a key, which is a hash over the
block's inputs and over the key of the block before it; it may be found even after its sequence was freed, until the
block is needed. (Kwon et al., vLLM, arXiv 2309.06180, sections 4.2 to 4.4.)
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError

BLOCK = 16  # tokens; llama.cpp's kernels and ours work on 16 tokens at a time


class NoBlocksError(EdgekitError):
    """The cache has too few free blocks. Nothing was changed."""


@dataclass(slots=True)
class Table:
    """The blocks of a sequence, and the input of each token that they hold: all that its keys and values depend on
    beside the tokens before it."""

    blocks: list[int] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # of the full blocks

    @property
    def length(self) -> int:
        return len(self.inputs)


class Blocks:
    """The blocks of one cache. copy(source, target): copies a block's content in the engine's memory; size: tokens to a
    block."""

    def __init__(self, number: int, copy: Callable[[int, int], None], size: int = BLOCK) -> None:
        self.number, self.size, self._copy = number, size, copy
        self.tables: dict[int, Table] = {}
        # What is noted here grows with the blocks that were ever taken: an engine asks for memory after this.
        self._users: defaultdict[int, int] = defaultdict(int)  # how many sequences hold each block
        self._keys: dict[int, bytes] = {}  # of blocks that can be found again
        self._found: dict[bytes, int] = {}
        self._untouched = 0  # this block, and those after it, were never taken
        # the least recently freed first, so that the content of the others can be found as long as possible
        self._freed: OrderedDict[int, None] = OrderedDict()

    @property
    def free(self) -> int:
        """How many blocks no sequence holds."""
        return self.number - self._untouched + len(self._freed)

    def length(self, sequence: int) -> int:
        """Return how many tokens of a sequence the cache holds; 0 for a sequence that it does not know."""
        return self.tables[sequence].length if sequence in self.tables else 0

    def count(self, tokens: int) -> int:
        """Return how many blocks hold this many tokens."""
        return -(-tokens // self.size)

    def array(self, sequence: int) -> npt.NDArray[np.int32]:
        """Return (blocks,) the blocks of a sequence in the order of its tokens."""
        return np.array(self._table(sequence).blocks, np.int32)

    def inputs(self, sequence: int) -> Sequence[bytes]:
        """Return the input of each token of a sequence."""
        return self._table(sequence).inputs

    def needed(self, sequence: int, tokens: int) -> int:
        """Return how many free blocks it takes to append this many tokens."""
        table = self.tables.get(sequence, Table())
        new = max(0, self.count(table.length + tokens) - len(table.blocks))
        return new + bool(tokens and self._shared_end(table))

    def reserve(self, appends: Sequence[tuple[int, int]]) -> None:
        """Make room for (sequence, tokens) each, for all or, with NoBlocksError, for none."""
        needed = sum(self.needed(sequence, tokens) for sequence, tokens in appends)
        if needed > self.free:
            raise NoBlocksError(
                f"{needed} blocks are needed, and {self.free} of {self.number} are free; end a sequence, or load the "
                f"model with a longer context ({self.size} tokens to a block)"
            )
        for sequence, tokens in appends:
            table = self.tables.setdefault(sequence, Table())
            end = table.length // self.size  # blocks behind it were reserved for a step that was given up
            if tokens and self._shared_end(table):
                new = self._take()
                self._copy(table.blocks[end], new)
                self._release(table.blocks[end])
                table.blocks[end] = new
            elif tokens and table.length % self.size:
                self._forget(table.blocks[end])  # after `truncate` it may have the key of what it held
            while len(table.blocks) < self.count(table.length + tokens):
                table.blocks.append(self._take())

    def append(self, sequence: int, inputs: Sequence[bytes]) -> None:
        """Note that the reserved blocks hold these tokens now."""
        table = self._table(sequence)
        table.inputs += inputs
        done = len(table.keys)
        for key in keys_of(table.inputs[done * self.size :], self.size, table.keys[-1] if done else b""):
            block = table.blocks[len(table.keys)]
            table.keys.append(key)
            other = self._found.get(key)
            if other is not None and not self._users[other]:  # it will be taken before this one is free
                self._forget(other)
                other = None
            if other is None:
                self._found[key], self._keys[block] = block, key

    def adopt(self, sequence: int, inputs: Sequence[bytes]) -> int:
        """Let a new sequence share the blocks that hold its beginning; return how many tokens they hold. The last token
        is never among them, because a step must compute its logits."""
        if sequence in self.tables:
            raise EdgekitError(f"sequence {sequence} exists already; only a new sequence can share a beginning")
        keys = list(itertools.takewhile(self._found.__contains__, keys_of(inputs[:-1], self.size)))
        shared = len(keys) * self.size
        if shared:
            self.tables[sequence] = Table([self._found[key] for key in keys], list(inputs[:shared]), keys)
            for block in self.tables[sequence].blocks:
                self._hold(block)
        return shared

    def fork(self, sequence: int, new: int) -> None:
        """Let a new sequence share all blocks of another one."""
        table = self._table(sequence)
        if new in self.tables:
            raise EdgekitError(f"sequence {new} exists already; free it before you fork sequence {sequence} to it")
        blocks = table.blocks[: self.count(table.length)]
        for block in blocks:
            self._hold(block)
        self.tables[new] = Table(blocks, list(table.inputs), list(table.keys))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all tokens of a sequence from this index on."""
        table = self._table(sequence)
        if not 0 <= length <= table.length:
            raise EdgekitError(f"sequence {sequence} has {table.length} tokens; it cannot be cut to {length}")
        del table.inputs[length:], table.keys[length // self.size :]
        while len(table.blocks) > self.count(length):
            self._release(table.blocks.pop())

    def remove(self, sequence: int) -> None:
        """Give all blocks of a sequence back. The blocks of its beginning are taken by others last."""
        for block in reversed(self._table(sequence).blocks):
            self._release(block)
        del self.tables[sequence]

    def _table(self, sequence: int) -> Table:
        if sequence not in self.tables:
            raise EdgekitError(f"there is no sequence {sequence}; there are {sorted(self.tables)}")
        return self.tables[sequence]

    def _shared_end(self, table: Table) -> bool:
        """Whether the next token goes into a block that another sequence holds, too."""
        return bool(table.length % self.size) and self._users[table.blocks[table.length // self.size]] > 1

    def _take(self) -> int:
        if self._untouched < self.number:
            block, self._untouched = self._untouched, self._untouched + 1
        else:
            block, _ = self._freed.popitem(last=False)
            self._forget(block)
        self._users[block] = 1
        return block

    def _hold(self, block: int) -> None:
        self._freed.pop(block, None)
        self._users[block] += 1

    def _release(self, block: int) -> None:
        self._users[block] -= 1
        if not self._users[block]:
            self._freed[block] = None

    def _forget(self, block: int) -> None:
        if (key := self._keys.pop(block, None)) is not None:
            del self._found[key]


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK)


def keys_of(inputs: Sequence[bytes], size: int, key: bytes = b"") -> Iterator[bytes]:
    """Yield the key of each full block of `size` tokens. A key depends on the inputs of its block and of all blocks
    before it. key: of the block before the first."""
    for start in range(0, len(inputs) - size + 1, size):
        parts = inputs[start : start + size]
        key = hashlib.sha256(key + b"".join(len(part).to_bytes(4, "little") + part for part in parts)).digest()
        yield key
