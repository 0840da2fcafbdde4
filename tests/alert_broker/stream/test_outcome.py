"""The outcome of each alert of a batch, without a broker."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from alert_broker.stream import config as configuration
from alert_broker.stream.dead_letters import REASON, DeadLetter
from alert_broker.stream.in_flight import InFlight
from alert_broker.stream.message_batch import MessageBatch
from alert_broker.stream.outcome import Outcome, ResultWriter
from alert_broker.stream.sender import Outgoing
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.hostile import FakeMessage, Hostile

CONFIG = configuration.parse({"dead_letters": {"topic": "dead"}}, "test")
WHERE = ("source", 0)


def in_flight(count, dead=()):
    """A batch of so many alerts; those in `dead` could not be read."""
    messages = [FakeMessage(Hostile(b"x"), k) for k in range(count)]
    batch = MessageBatch(messages, (WHERE,), (1,), np.zeros(count, np.int64), np.arange(count), 0.0)
    index = np.array([k for k in range(count) if k not in dead], np.int64)
    rows = pa.RecordBatch.from_pydict({"best_class": ["SN"] * len(index)})
    return InFlight(batch, dead_letters=[DeadLetter(k, "unreadable") for k in dead], rows=rows, index=index)


def result(index, topic="results"):
    return Outgoing(topic, b"result", [], index)


def accounted(outcome, owned):
    stats = Stats()
    stats.ledger.add(WHERE, consumed=len(owned))
    outcome.account(stats, np.array(owned))
    total = stats.ledger.total()
    return total.published, total.filtered, total.dead_lettered, total.in_flight


def test_each_alert_has_one_outcome():
    outcome = Outcome(in_flight(4, dead=[2]), [result(0), result(0, "other"), result(3)], CONFIG, archived=False)
    assert [message.topic for message in outcome.messages(np.ones(4, np.bool_))] == [
        "results",
        "other",
        "results",
        "dead",
    ]
    assert accounted(outcome, [True] * 4) == (2, 1, 1, 0)


def test_rows_in_the_archive_count_as_published():
    outcome = Outcome(in_flight(4, dead=[2]), [], CONFIG, archived=True)
    assert accounted(outcome, [True] * 4) == (3, 0, 1, 0)


def test_classes_are_counted_of_final_results_only():
    """Not those of another member's alerts, nor those of results that became dead letters."""
    work = in_flight(4, dead=[1])
    work.rows = pa.RecordBatch.from_pydict({"best_class": ["SN", "AGN", None]})  # of the alerts 0, 2 and 3
    outcome, stats = Outcome(work, [result(0), result(2), result(3)], CONFIG, archived=False), Stats()
    stats.ledger.add(WHERE, consumed=4)
    outcome.account(stats, np.array([True, True, False, True]))
    assert stats.classes == {"SN": 1}
    refused = Outcome(work, [result(0), result(2)], CONFIG, archived=False)
    refused.instead([(result(0), "too large")])
    refused.account(stats, np.ones(4, np.bool_))
    assert stats.classes == {"SN": 1, "AGN": 1}


def test_alerts_of_a_revoked_partition_are_neither_sent_nor_counted():
    outcome = Outcome(in_flight(3, dead=[2]), [result(0), result(1)], CONFIG, archived=False)
    owned = np.array([True, False, False])
    assert [message.alert_index for message in outcome.messages(owned)] == [0]
    assert accounted(outcome, owned) == (1, 0, 0, 2)


def test_an_alert_whose_results_are_refused_is_one_dead_letter():
    outcome = Outcome(in_flight(2), [result(0), result(0, "other"), result(1)], CONFIG, archived=False)
    (letter,) = outcome.instead([(result(0), "too large"), (result(0, "other"), "too large as well")])
    assert (letter.topic, letter.alert_index) == ("dead", 0)
    assert dict(letter.headers)[REASON] == b"the result cannot be sent: too large; too large as well"
    assert outcome.instead([(result(0), "refused later")]) == []  # it has its dead letter
    assert accounted(outcome, [True, True]) == (1, 0, 1, 0)


def test_a_dead_letter_that_is_refused_is_sent_without_its_payload():
    outcome = Outcome(in_flight(1, dead=[0]), [], CONFIG, archived=False)
    (whole,) = outcome.messages(np.ones(1, np.bool_))
    (letter,) = outcome.instead([(whole, "too large")])
    assert letter.value is None
    assert accounted(outcome, [True]) == (0, 0, 1, 0)


def test_a_row_that_cannot_be_written_takes_no_other_along(monkeypatch):
    """The router fails on a whole batch because of one alert in it, whose row then counts as a dead letter."""
    work = in_flight(3)
    work.rows = pa.RecordBatch.from_pydict({"best_class": ["good", "bad", "good"]})

    def router(rows, packets, schema_text):
        if "bad" in rows["best_class"].to_pylist():
            raise ZeroDivisionError("of the test")
        messages = [SimpleNamespace(topic="results", value=b"v", row=k, key=b"k") for k in range(rows.num_rows)]
        return SimpleNamespace(messages=messages)

    results = ResultWriter(CONFIG, router, None).results(work)
    assert [message.alert_index for message in results] == [0, 2]
    outcome = Outcome(work, results, CONFIG, archived=False)
    assert "ZeroDivisionError: of the test" in outcome.dead_letters[0].reason
    assert accounted(outcome, [True] * 3) == (2, 0, 1, 0)


def test_an_error_for_the_user_is_no_fault_of_an_alert():
    def router(rows, packets, schema_text):
        raise EdgekitError("the registry is away")

    with pytest.raises(EdgekitError, match="the registry is away"):
        ResultWriter(CONFIG, router, None).results(in_flight(3))
