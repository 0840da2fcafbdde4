"""Batches are cut into pieces and shared among workers: every row runs once, and the caller gets an error of a
worker."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, get_ident

import pytest

from runtimes.sessions.rows import cut, share_out


@pytest.mark.parametrize(("rows", "chunk", "sizes"), [(0, 4, []), (3, 4, [3]), (8, 4, [4, 4]), (9, 4, [4, 4, 1])])
def test_every_row_is_in_one_piece(rows, chunk, sizes):
    pieces = cut(rows, chunk)
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_each_piece_is_called_once_by_that_many_workers(workers):
    seen, met = [], Barrier(workers, timeout=20)
    with ThreadPoolExecutor(4) as pool:

        def call(piece):
            if piece.start < workers:
                met.wait()  # only as many as there are workers can all get here
            seen.append((piece.start, get_ident()))

        share_out(pool, workers, cut(40, 1), call)
    assert sorted(start for start, _ in seen) == list(range(40))
    assert len({thread for _, thread in seen}) == workers


def test_an_error_in_a_piece_reaches_the_caller():
    def call(piece):
        if piece.start == 7:
            raise ValueError("piece 7")

    with ThreadPoolExecutor(2) as pool:
        for workers in (1, 3):
            with pytest.raises(ValueError, match="piece 7"):
                share_out(pool, workers, cut(20, 1), call)
