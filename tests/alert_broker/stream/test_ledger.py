from dataclasses import asdict
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alert_broker.stream.ledger import Ledger
from edgekit.errors import EdgekitError

FATES = ("published", "filtered", "dead_lettered")


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(("consumed", *FATES, "revoke")), st.integers(0, 9))))
def test_what_was_taken_is_always_somewhere(events):
    """The ledger is compared with plain sums over the list of events."""
    ledger, taken, sealed, lost = Ledger(), [0] * 3, [0] * 3, [0] * 3
    for partition, column, number in events:
        if column == "revoke":
            in_flight = taken[partition] - sealed[partition] - lost[partition]
            assert ledger.revoke(("t", partition)) == in_flight
            lost[partition] += in_flight
        else:
            ledger.add(("t", partition), **{column: number})
            (taken if column == "consumed" else sealed)[partition] += number
    assert ledger.revoked == sum(lost)
    assert ledger.total().in_flight == sum(taken) - sum(sealed) - sum(lost)
    for (_, partition), entry in ledger.entries.items():
        assert entry.consumed + entry.revoked == taken[partition]


def test_books_that_are_out_of_balance_are_an_error():
    ledger = Ledger()
    ledger.add(("ztf", 3), consumed=5, published=3, filtered=1, dead_lettered=1)
    ledger.check()
    ledger.add(("ztf", 3), consumed=1)
    with pytest.raises(
        EdgekitError, match=r"ztf\[3\] does not add up: 6 consumed, 3 published \+ 1 filtered \+ 1 dead"
    ):
        ledger.check()
    ledger.revoke(("ztf", 3))
    ledger.check()
    assert ledger.to_json() | {"partitions": 0} == {
        "partitions": 0,
        "in_flight": 0,
        "revoked": 1,
        "total": {"consumed": 5, "published": 3, "filtered": 1, "dead_lettered": 1, "revoked": 1, "expired": 0},
    }


def test_a_copy_stays_as_it_was():
    ledger = Ledger()
    ledger.add(("t", 0), consumed=2)
    copy = ledger.copy()
    ledger.add(("t", 0), consumed=1)
    ledger.add(("t", 1), consumed=1)
    assert {at: asdict(entry)["consumed"] for at, entry in copy.entries.items()} == {("t", 0): 2}


def test_threads_lose_nothing():
    ledger = Ledger()
    threads = [Thread(target=lambda: [ledger.add(("t", 0), consumed=1) for _ in range(2000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.total().consumed == 8000
