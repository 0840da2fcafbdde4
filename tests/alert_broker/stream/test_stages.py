"""Decoding and classifying without Kafka: every message has one fate, in order, and one bad alert costs only itself."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pytest

from alert_broker.classify import OVER_TIME
from alert_broker.packets import AlertBatch
from alert_broker.stream import stages as module
from alert_broker.stream.stages import Stages
from alert_broker.surveys.ztf import Ztf
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError

SCHEMA = pa.schema([("offset", pa.int64()), ("points", pa.int64()), ("status", pa.string())])
GARBAGE, EMPTY = b"not a packet", b""


@dataclass
class Counting:
    """A classifier whose rows are the index and the number of points; it fails for some indices, and takes too long for
    others."""

    bad: frozenset[int] = frozenset()
    error: type[Exception] = ValueError
    schema: pa.Schema = SCHEMA
    sizes: list[int] = field(default_factory=list)
    late: frozenset[int] = frozenset()

    def __call__(self, batch: AlertBatch) -> pa.RecordBatch:
        self.sizes.append(len(batch.curves))
        if found := self.bad & set(batch.alerts["offset"].to_pylist()):
            raise self.error(f"alert {min(found)} of the test")
        points = pa.array(batch.curves.points, pa.int64())
        status = [OVER_TIME if k in self.late else None for k in batch.alerts["offset"].to_pylist()]
        return pa.RecordBatch.from_arrays(
            [batch.alerts["offset"], points, pa.array(status, pa.string())], schema=SCHEMA
        )


def decoded(stages, values):
    """Indices that gave a light curve, and those that gave none."""
    alerts, dead_letters = stages.decode(values)
    offsets = [offset for batch in alerts for offset in batch.alerts["offset"].to_pylist()]
    return sorted(offsets), sorted(dead_letter.index for dead_letter in dead_letters)


@pytest.mark.parametrize("seed", range(4))
def test_every_message_has_one_fate_and_keeps_its_index(packets, seed):
    rng = np.random.default_rng(seed)
    values = [(GARBAGE, EMPTY, None, packets[k][:-20], packets[k], packets[k])[rng.integers(6)] for k in range(12)]
    good, bad = decoded(Stages(None), values)
    assert good == [k for k in range(12) if values[k] == packets[k]]
    assert sorted(good + bad) == list(range(12))


def test_a_batch_gives_what_its_messages_give_alone(packets):
    stages = Stages(Counting())
    rows, dead_letters = stages.classify(stages.decode(packets[:6])[0])
    assert dead_letters == []
    alone = [stages.classify(stages.decode([packet])[0])[0]["points"][0].as_py() for packet in packets[:6]]
    assert rows["points"].to_pylist() == alone
    assert rows["offset"].to_pylist() == list(range(6))


def breaking(monkeypatch, names, error=ValueError):
    """ZTF's reader fails on a batch that holds one of these objects; the sizes of the batches that it saw."""
    real, sizes = Ztf.extract, []

    def extract(self, alerts):
        found = real(self, alerts)
        sizes.append(len(alerts))
        if names & set(found.object_id):
            raise error("of the test")
        return found

    monkeypatch.setattr(Ztf, "extract", extract)
    return sizes


def object_ids(stages, values):
    return [name for batch in stages.decode(values)[0] for name in batch.alerts["object_id"].to_pylist()]


@pytest.mark.parametrize("error", [ValueError, RuntimeError], ids=["a reason for all", "an exception"])
def test_an_alert_that_breaks_decoding_takes_no_other_along(packets, monkeypatch, error):
    ids = object_ids(Stages(None), packets[:8])
    sizes = breaking(monkeypatch, {ids[2], ids[5]}, error)
    good, bad = decoded(Stages(None), packets[:8])
    assert (good, bad) == ([0, 1, 3, 4, 6, 7], [2, 5])
    assert sizes == [8] + [1] * 8


def test_one_reason_of_one_alert_is_not_decoded_again(packets, monkeypatch):
    sizes = breaking(monkeypatch, set())
    values = [packets[0], GARBAGE, packets[1]]
    assert decoded(Stages(None), values) == ([0, 2], [1])
    assert sizes == [2]


def test_a_registry_that_does_not_answer_is_no_alerts_fault():
    def schema_text(identifier):
        raise EdgekitError("the registry does not answer")

    with pytest.raises(EdgekitError, match="does not answer"):
        Stages(None, schema_text).decode([b"\0\0\0\x12\x67datum", GARBAGE])


def test_the_next_batch_has_nothing_of_one_that_failed(packets, monkeypatch):
    stages = Stages(None)
    with monkeypatch.context() as patch:
        breaking(patch, set(object_ids(stages, packets[:2])), RuntimeError)
        assert decoded(stages, packets[:4]) == ([2, 3], [0, 1])
    assert decoded(stages, packets[4:7]) == ([0, 1, 2], [])


@pytest.mark.parametrize("bad", [{0}, {7}, {3, 4}, {0, 2, 5}, set(range(8))])
def test_alerts_that_break_the_classifier_are_found_by_halves(packets, bad):
    classifier = Counting(frozenset(bad))
    stages = Stages(classifier)
    rows, dead_letters = stages.classify(stages.decode(packets[:8])[0])
    assert rows.schema.equals(SCHEMA)
    assert rows["offset"].to_pylist() == [k for k in range(8) if k not in bad]
    assert {(item.index, item.reason) for item in dead_letters} == {
        (k, f"classifying failed (ValueError: alert {k} of the test)") for k in bad
    }
    assert all(item.stack for item in dead_letters)
    assert len(classifier.sizes) <= 2 * 8 - 1
    assert len(classifier.sizes) <= 1 + 2 * 3 * len(bad), "halving, not one by one"


def test_a_model_that_cannot_be_used_is_no_alerts_fault(packets):
    stages = Stages(Counting(frozenset({1}), EdgekitError))
    alerts, _ = stages.decode(packets[:4])
    with pytest.raises(EdgekitError, match="alert 1 of the test"):
        stages.classify(alerts)


def test_nothing_gives_no_rows_with_the_columns_of_some():
    rows, dead_letters = Stages(Counting()).classify([])
    assert (rows.num_rows, rows.schema, dead_letters) == (0, SCHEMA, [])


def test_rows_of_several_batches_are_in_the_order_of_their_messages(packets):
    """Surveys are decoded apart, and their messages come mixed."""
    from alert_broker import simulated_packets
    from alert_broker.simulate import simulate

    rubin = [simulated_packets.message("lsst", alert.packet) for alert in simulate("lsst", 3, 3, cutouts=False)]
    mixed = [packets[0], rubin[0], packets[1], rubin[1], GARBAGE, rubin[2], packets[2]]
    stages = Stages(Counting())
    alerts, dead_letters = stages.decode(mixed)
    assert {batch.survey.name for batch in alerts} == {"ztf", "lsst"}
    assert [item.index for item in dead_letters] == [4]
    assert stages.classify(alerts)[0]["offset"].to_pylist() == [0, 1, 2, 3, 5, 6]
    assert stages.classify(alerts[::-1])[0]["offset"].to_pylist() == [0, 1, 2, 3, 5, 6]


def test_read_buffers_are_used_again_for_some_schemas_only(packets, monkeypatch):
    stages = Stages(None)
    stages.decode(packets[:2])
    (columns,) = stages._buffer_pool.values()
    stages.decode(packets[2:4])
    assert list(stages._buffer_pool.values()) == [columns]
    monkeypatch.setattr(module, "MOST_POOLED", 0)
    stages.decode(packets[:2])
    assert stages._buffer_pool == {}


def test_alerts_over_their_time_budget_are_dead_letters(packets):
    stages = Stages(Counting(late=frozenset({1, 4})), budget=Budget(2.5))
    rows, dead_letters = stages.classify(stages.decode(packets[:6])[0])
    assert rows["offset"].to_pylist() == [0, 2, 3, 5]
    assert [dead_letter.index for dead_letter in dead_letters] == [1, 4]
    assert {dead_letter.reason for dead_letter in dead_letters} == {f"{OVER_TIME}: 2.5 s (model.alert_seconds)"}


def test_work_that_is_cancelled_makes_no_dead_letters(packets):
    stages = Stages(Counting(bad=frozenset({0}), error=CancelledError))
    with pytest.raises(CancelledError):
        stages.classify(stages.decode(packets[:3])[0])
    asked = []
    stages = Stages(None, budget=Budget(cancelled=lambda: asked.append(1) or len(asked) > 2))
    with pytest.raises(CancelledError):
        stages.decode(packets[:8])
    assert len(asked) == 3  # between two messages, not behind the last one
