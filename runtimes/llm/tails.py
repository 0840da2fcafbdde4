"""The tails of sequences whose cache holds full blocks in 4 bits: float16 copies of the tokens of a block that is being
filled (Liu et al., KIVI, arXiv 2402.02750, section 3.3).

A step has a tail for each block that it writes to. Behind it a sequence keeps the tail of its last block, and that of
the block before, so that a few tokens can be taken back.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Memory = npt.NDArray[np.uint8]


class Tails:
    """size: bytes of a tail; block: tokens to a block."""

    def __init__(self, size: int, block: int) -> None:
        self._size, self._block = size, block
        self._of: dict[int, dict[int, Memory]] = {}  # by sequence, and by the number of the block in it
        self._unused: list[Memory] = []

    @property
    def held(self) -> int:
        """The bytes of all tails."""
        return self._size * (len(self._unused) + sum(map(len, self._of.values())))

    def extend(self, sequence: int, length: int, tokens: int) -> None:
        """Have a tail for each block into which these tokens go, behind `length` others."""
        tails = self._of.setdefault(sequence, {})
        for number in range(length // self._block, (length + tokens - 1) // self._block + 1):
            if number not in tails:
                tails[number] = self._take()

    def settle(self, sequence: int, length: int) -> None:
        """Give back the tails that a sequence of this length does not need."""
        last = length // self._block
        tails = self._of.get(sequence, {})
        for number in [number for number in tails if not last - 1 <= number <= last]:
            self._unused.append(tails.pop(number))

    def kept(self, sequence: int, length: int) -> int:
        """Return to which length, at most `length`, a sequence can be cut: a block that is begun needs its tail."""
        number = length // self._block
        return length if number in self._of.get(sequence, {}) else number * self._block

    def fork(self, sequence: int, new: int) -> None:
        self._of[new] = {}
        for number, tail in self._of.get(sequence, {}).items():
            self._of[new][number] = self._take()
            self._of[new][number][:] = tail

    def remove(self, sequence: int) -> None:
        self._unused += self._of.pop(sequence, {}).values()

    def content(self, sequence: int, length: int) -> bytes:
        """Return a copy of the tail of the block that is begun; empty if there is none."""
        return self._of[sequence][length // self._block].tobytes() if length % self._block else b""

    def write(self, sequence: int, length: int, content: bytes) -> None:
        """Begin a sequence of this length with such a copy."""
        if content:
            self.extend(sequence, length, 1)
            self._of[sequence][length // self._block][:] = np.frombuffer(content, np.uint8)

    def addresses(self, sequence: int, blocks: int) -> npt.NDArray[Any]:
        """Return (blocks,) the address of each block's tail, or 0."""
        found = np.zeros(blocks, np.uintp)
        for number, tail in self._of.get(sequence, {}).items():
            if number < blocks:
                found[number] = tail.ctypes.data
        return found

    def _take(self) -> Memory:
        return self._unused.pop() if self._unused else np.empty(self._size, np.uint8)
