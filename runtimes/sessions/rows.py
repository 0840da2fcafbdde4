"""Cut a batch into pieces that several workers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


def cut(rows: int, chunk: int) -> list[slice]:
    """Cut the rows into pieces of `chunk`; the last piece may be smaller."""
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def share_out(pool: ThreadPoolExecutor, workers: int, pieces: Sequence[slice], call: Callable[[slice], None]) -> None:
    """Call `call` with each piece, on `workers` threads including this one. Each thread takes the next piece when it is
    free, so a core that other programs occupy delays no other core."""
    waiting = iter(pieces)

    def work() -> None:
        while (piece := next(waiting, None)) is not None:
            call(piece)

    helpers = [pool.submit(work) for _ in range(min(workers, len(pieces)) - 1)]
    work()
    for helper in helpers:
        helper.result()
