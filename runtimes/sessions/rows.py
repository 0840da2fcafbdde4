"""A batch cut into rows that workers share out among themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


def cut(rows: int, chunk: int) -> list[slice]:
    """The rows, `chunk` at a time; the last piece is what is left."""
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def share_out(pool: ThreadPoolExecutor, workers: int, pieces: Sequence[slice], call: Callable[[slice], None]) -> None:
    """`call` each piece, on `workers` threads, this one among them. They take the next piece as they become free, so
    that a core that other programs use holds nobody up."""
    waiting = iter(pieces)

    def work() -> None:
        while (piece := next(waiting, None)) is not None:
            call(piece)

    helpers = [pool.submit(work) for _ in range(min(workers, len(pieces)) - 1)]
    work()
    for helper in helpers:
        helper.result()
