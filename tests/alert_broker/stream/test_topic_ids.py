"""An id that differs from the one before is told once; a broker that does not answer tells nothing."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException, Uuid

from alert_broker.stream import topic_ids as module
from alert_broker.stream.topic_ids import TopicIds


class Admin:
    """ids: what the broker answers at once; None is an error, and a future is an answer that is still to come."""

    def __init__(self, **ids):
        self.ids, self.asked = ids, 0

    def describe_topics(self, topics, request_timeout):
        self.asked += 1
        return {name: answer if isinstance(answer, Future) else done(answer) for name, answer in self.ids.items()}


def done(topic_id) -> Future:
    future = Future()
    if topic_id is None:
        future.set_exception(KafkaException(KafkaError(KafkaError.UNKNOWN_TOPIC_OR_PART)))
    else:
        future.set_result(SimpleNamespace(topic_id=topic_id))
    return future


@pytest.fixture
def every_time(monkeypatch):
    monkeypatch.setattr(module, "ASK_SECONDS", 0.0)


@pytest.mark.usefixtures("every_time")
def test_a_topic_that_was_created_again_is_told_once():
    ids = TopicIds(admin := Admin(ztf="a", lsst="b"), ["ztf", "lsst"])
    assert [ids.changed() for _ in range(4)] == [[]] * 4  # the twin: the same ids
    admin.ids["ztf"] = None  # deleted
    assert [ids.changed() for _ in range(4)] == [[]] * 4
    admin.ids["ztf"] = "c"
    assert [ids.changed() for _ in range(4)] == [[], ["ztf"], [], []]


@pytest.mark.usefixtures("every_time")
def test_a_broker_without_ids_tells_nothing():
    """Its answer is zeros. While the nodes of a cluster are upgraded, both kinds of answers come."""
    ids = TopicIds(admin := Admin(ztf=str(Uuid(0, 0))), ["ztf"])
    for answer in (str(Uuid(0, 0)), "a", str(Uuid(0, 0)), "a"):
        admin.ids["ztf"] = answer
        assert [ids.changed() for _ in range(2)] == [[], []]
    admin.ids["ztf"] = "b"  # the twin
    assert [ids.changed() for _ in range(2)] == [[], ["ztf"]]


@pytest.mark.usefixtures("every_time")
def test_nobody_waits_for_an_answer():
    late = Future()
    ids = TopicIds(admin := Admin(ztf=late), ["ztf"])
    assert [ids.changed() for _ in range(5)] == [[]] * 5
    assert admin.asked == 1  # while an answer is to come, there is no other question
    late.set_result(SimpleNamespace(topic_id="a"))
    admin.ids["ztf"] = "b"
    assert [ids.changed() for _ in range(2)] == [[], ["ztf"]]


def test_the_question_is_asked_now_and_then(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    ids = TopicIds(admin := Admin(ztf="a"), ["ztf"])
    for _ in range(10):
        ids.changed()
    assert admin.asked == 1
    now[0] += module.ASK_SECONDS
    ids.changed()
    assert admin.asked == 2
