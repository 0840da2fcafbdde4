"""Blocks of a cache: none is lost, none is written while shared, and content is found by what it was made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError
from runtimes.llm.blocks import BLOCK, Blocks, NoBlocksError, blocks_for


def tokens(*numbers):
    return [number.to_bytes(4, "little") for number in numbers]


class Memory:
    """A cache whose content can be read: each block has the inputs that were written into its slots."""

    def __init__(self, number):
        self.slots = [[None] * BLOCK for _ in range(number)]
        self.blocks = Blocks(number, self.copy)

    def copy(self, source, target):
        self.slots[target] = list(self.slots[source])

    def append(self, sequence, inputs):
        self.blocks.reserve([(sequence, len(inputs))])
        table, start = self.blocks.tables[sequence], self.blocks.length(sequence)
        for at, item in enumerate(inputs, start):
            self.slots[table.blocks[at // BLOCK]][at % BLOCK] = item
        self.blocks.append(sequence, inputs)

    def read(self, sequence):
        table = self.blocks.tables[sequence]
        return [self.slots[table.blocks[at // BLOCK]][at % BLOCK] for at in range(table.length)]


def test_a_fork_shares_blocks_and_copies_only_what_it_writes():
    memory = Memory(8)
    memory.append(0, tokens(*range(20)))
    memory.blocks.fork(0, 1)
    assert memory.blocks.free == 6
    memory.append(1, tokens(99))
    assert memory.blocks.free == 5
    memory.append(0, tokens(77))
    assert memory.read(0) == tokens(*range(20), 77)
    assert memory.read(1) == tokens(*range(20), 99)


def test_blocks_that_were_reserved_for_a_step_that_was_given_up_stay_with_their_sequence():
    memory = Memory(10)
    memory.append(0, tokens(*range(20)))
    memory.blocks.reserve([(0, 40)])  # nothing is written
    memory.blocks.fork(0, 1)
    memory.append(0, tokens(*range(100, 130)))
    memory.append(1, tokens(*range(200, 230)))
    assert memory.read(0) == tokens(*range(20), *range(100, 130))
    assert memory.read(1) == tokens(*range(20), *range(200, 230))


def test_a_new_sequence_finds_full_blocks_of_the_same_beginning_even_after_they_were_freed():
    memory = Memory(8)
    memory.append(0, tokens(*range(40)))
    memory.blocks.remove(0)
    assert memory.blocks.adopt(1, tokens(*range(40))) == 32
    assert memory.read(1) == tokens(*range(32))
    assert memory.blocks.adopt(2, tokens(1, *range(1, 40))) == 0  # another beginning
    assert memory.blocks.adopt(3, tokens(*range(32))) == 16  # the last token must be computed


def test_a_block_that_was_cut_and_written_again_is_not_found_under_its_old_key():
    memory = Memory(8)
    memory.append(0, tokens(*range(16)))
    memory.blocks.truncate(0, 10)
    memory.append(0, tokens(*range(50, 56)))
    assert memory.blocks.adopt(1, tokens(*range(17))) == 0
    assert memory.blocks.adopt(2, tokens(*range(10), *range(50, 57))) == 16


def test_content_is_forgotten_when_its_block_is_needed():
    memory = Memory(2)
    memory.append(0, tokens(*range(32)))
    memory.blocks.remove(0)
    memory.append(1, tokens(*range(100, 132)))
    assert memory.blocks.adopt(2, tokens(*range(33))) == 0


def test_of_two_blocks_with_the_same_content_the_one_in_use_is_found():
    memory = Memory(4)
    memory.append(0, tokens(*range(16)))
    memory.blocks.remove(0)
    memory.append(1, tokens(*range(16)))
    memory.append(2, tokens(*range(100, 132)))  # takes the block of sequence 0
    memory.append(2, tokens(*range(132, 140)))
    assert memory.blocks.adopt(3, tokens(*range(17))) == 16
    assert memory.read(3) == tokens(*range(16))


def test_room_is_made_for_all_or_for_none():
    memory = Memory(3)
    with pytest.raises(NoBlocksError, match="4 blocks are needed, and 3 of 3 are free"):
        memory.blocks.reserve([(0, 20), (1, 20)])
    assert memory.blocks.free == 3
    assert not memory.blocks.tables


def test_wrong_sequences_and_lengths_are_refused():
    memory = Memory(3)
    memory.append(0, tokens(1))
    for call in (
        lambda: memory.blocks.fork(5, 6),
        lambda: memory.blocks.fork(0, 0),
        lambda: memory.blocks.remove(5),
        lambda: memory.blocks.truncate(0, 2),
        lambda: memory.blocks.adopt(0, tokens(1)),
    ):
        with pytest.raises(EdgekitError):
            call()


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "give up", "fork", "truncate", "remove", "adopt"]),
        st.integers(0, 4),
        st.integers(0, 40),
    ),
    max_size=60,
)


@given(ACTIONS)
@settings(max_examples=150)
def test_whatever_is_done_every_sequence_reads_its_own_tokens_and_no_block_is_lost(actions):
    memory, expected, counter = Memory(12), {}, 0
    for action, sequence, number in actions:
        if action == "append":
            start = len(expected.get(sequence, []))
            new = (
                tokens(*range(start, start + number))
                if number % 2
                else tokens(*range(1000 + counter, 1000 + counter + number))
            )
            counter += number
            try:
                memory.append(sequence, new)
            except NoBlocksError:
                continue
            expected.setdefault(sequence, []).extend(new)
        elif action == "give up":  # a step that reserves blocks and writes nothing
            try:
                memory.blocks.reserve([(sequence, number)])
            except NoBlocksError:
                continue
            expected.setdefault(sequence, [])
        elif action == "fork" and sequence in expected and number not in expected:
            memory.blocks.fork(sequence, number)
            expected[number] = list(expected[sequence])
        elif action == "truncate" and sequence in expected:
            length = min(number, len(expected[sequence]))
            memory.blocks.truncate(sequence, length)
            del expected[sequence][length:]
        elif action == "remove" and sequence in expected:
            memory.blocks.remove(sequence)
            del expected[sequence]
        elif action == "adopt" and sequence not in expected:
            wanted = tokens(*range(number))
            if found := memory.blocks.adopt(sequence, wanted):
                expected[sequence] = wanted[:found]
        for known, content in expected.items():
            assert memory.read(known) == content
        held = {block for table in memory.blocks.tables.values() for block in table.blocks}
        assert len(held) + memory.blocks.free == 12
        for table in memory.blocks.tables.values():
            assert len(table.blocks) >= blocks_for(table.length)
    for known in list(expected):
        memory.blocks.remove(known)
    assert memory.blocks.free == 12


def test_the_blocks_of_a_sequence_are_given_in_order():
    memory = Memory(4)
    memory.append(0, tokens(*range(33)))
    assert memory.blocks.array(0).dtype == np.int32
    assert len(memory.blocks.array(0)) == 3
