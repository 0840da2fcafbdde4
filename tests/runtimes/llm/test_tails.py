"""The cache in 4 bits: what is kept of a block that is begun, how far a sequence can be cut, and what it costs."""

from contextlib import closing

import numpy as np
import pytest

from runtimes.llm.engine import Item
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.tails import Tails
from tests.runtimes.llm.conftest import compiler

IDS = np.random.default_rng(3).integers(0, 300, 330)


@compiler
@pytest.mark.parametrize(("length", "kept"), [(330, 330), (321, 321), (300, 300), (256, 256), (255, 192), (130, 128)])
def test_a_sequence_can_be_cut_where_its_tails_reach(toy, length, kept):
    """330 tokens are five blocks and ten tokens: the tails of the fifth and of the sixth block are there."""
    with closing(NativeEngine(toy(), blocks=48, kv="int4")) as engine:
        expected = engine.step([Item(0, IDS, logits="all")])[0]
        assert engine.truncate(0, length) == kept == engine.length(0)
        rest = np.append(IDS[kept:], IDS[:1])
        found = engine.step([Item(0, rest, logits="all")])[0]
        assert np.array_equal(found[:-1], expected[kept:])


@compiler
def test_what_is_kept_of_sequences_and_what_is_given_back(toy):
    with closing(NativeEngine(toy(), blocks=96, kv="int4")) as engine:
        engine.step([Item(0, IDS)])
        engine.step([Item(1, IDS[:100])])
        assert {key: sorted(tails) for key, tails in engine._tails._of.items()} == {0: [4, 5], 1: [0, 1]}
        held = engine._tails.held
        assert held == 6 * engine._library.engine_tail_bytes(engine._engine)  # of the six blocks of the longest step
        for _ in range(5):
            engine.fork(0, 2)
            engine.remove(2)
        assert engine._tails.held == held  # a fork takes what the longest step has left
        for sequence in (0, 1):
            engine.remove(sequence)
        assert not engine._tails._of


@compiler
def test_four_bits_take_28_per_cent_of_the_memory(toy):
    model = toy("llama", "F32", head_size=64)
    sizes = {}
    for kv in ("f16", "int8", "int4"):
        with closing(NativeEngine(model, blocks=64, kv=kv)) as engine:
            sizes[kv] = engine._block_bytes * engine.blocks.number
    assert sizes["int4"] / sizes["f16"] == pytest.approx(4.5 / 16)
    assert sizes["int8"] / sizes["f16"] == pytest.approx(8.5 / 16)


def test_a_tail_that_was_given_back_is_used_again():
    tails = Tails(8, 4)
    tails.extend(0, 0, 9)
    assert tails.held == 24
    tails.settle(0, 9)
    tails.extend(1, 0, 4)
    assert tails.held == 24
    tails.write(2, 6, b"abcdefgh")
    assert tails.content(2, 6) == b"abcdefgh"
    assert tails.content(2, 8) == b""
    assert [bool(address) for address in tails.addresses(2, 3)] == [False, True, False]
    tails.fork(2, 3)
    tails.write(2, 6, b"ijklmnop")
    assert tails.content(3, 6) == b"abcdefgh"
    assert (tails.kept(2, 7), tails.kept(2, 3), tails.kept(9, 7)) == (7, 0, 4)
