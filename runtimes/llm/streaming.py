"""Weights that do not fit into memory: layers are read from the file again for each step.

Some layers stay in memory, as many as the budget allows. The others share two buffers: while the engine computes one
layer, a thread reads the next one from the mapped file into the other buffer. The engine computes the same numbers.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError


def kept_layers(memory: int, always: int, sizes: Sequence[int]) -> int:
    """Return how many of the first layers stay in memory. memory: bytes for all weights; always: bytes of the embedding
    and the head, which stay; sizes: bytes of each layer. Raises if not even two layers fit beside what stays."""
    if memory >= always + sum(sizes):
        return len(sizes)
    buffers = 2 * max(sizes)
    if memory < always + buffers:
        raise EdgekitError(
            f"weights_memory = {memory:,} bytes; this model needs at least {always + buffers:,}: {always:,} for the "
            f"embedding and the head, and {buffers:,} for two layers"
        )
    kept = 0
    while always + sum(sizes[: kept + 1]) + buffers <= memory:
        kept += 1
    return kept


class LayerStream:
    """The two buffers. layers: the numbers of those that share them; load(number, buffer): reads a layer."""

    def __init__(self, layers: Sequence[int], load: Callable[[int, int], None]) -> None:
        self._load = load
        self._next = dict(zip(layers, [*layers[1:], layers[0]], strict=True))
        self._buffers: list[int | None] = [None, None]
        self._worker = ThreadPoolExecutor(1, "edgekit-weights")
        self._pending: Future[None] | None = None

    def ready(self, number: int) -> None:
        """Return when a layer is in memory, and begin to read the next one. The caller may compute this layer until it
        asks for another one."""
        if number not in self._next:
            return
        self._wait()
        if number not in self._buffers:
            self._fill(number, 0)
        following = self._next[number]
        if following not in self._buffers:
            self._pending = self._worker.submit(self._fill, following, 1 - self._buffers.index(number))

    def _fill(self, number: int, buffer: int) -> None:
        self._buffers[buffer] = None  # should it fail, the buffer has no whole layer
        self._load(number, buffer)
        self._buffers[buffer] = number

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the layer that is being read, and end the thread."""
        self._worker.shutdown(cancel_futures=True)


def release_pages(content: npt.NDArray[np.uint8]) -> None:
    """Give back the memory of a mapped file of which this is a part. What is needed of it is read again. The whole file
    is released, because the system maps up to megabytes around each byte that is read."""
    base: Any = content.base
    while isinstance(base, np.ndarray):
        base = base.base
    mapping = base.obj if isinstance(base, memoryview) else base
    if isinstance(mapping, mmap.mmap):  # and no array of its own, whose content would be lost
        mapping.madvise(mmap.MADV_DONTNEED)
