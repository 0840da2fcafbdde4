"""Faults of a real Apache Kafka, with counts: brokers that are killed, logs that are cut, orders to stop at any moment.

Minutes of work, by `make test-kafka`. A process that ends with status 1 or 75 is started again, as a supervisor does;
one that a signal ends, or that is stuck, fails the test.
"""

import random
import signal
import time
from collections import Counter

import pytest
from confluent_kafka import Producer, TopicPartition

from alert_broker.stream.clients import Admin
from alert_broker.stream.stats import Stats
from tests.alert_broker.conftest import REAL
from tests.alert_broker.stream.rig import START_SECONDS, Rig, repeat
from tests.alert_broker.stream.supervised import LONG, MODES, STUCK_SECONDS, survive, wait_until_committed
from tests.alert_broker.stream.test_faults import BATCH, REPEATED, Feed, committed
from tests.alert_broker.stream.waiting import wait_for
from tests.apache_kafka import ApacheKafka, missing
from tests.brokers import configure_topic

pytestmark = [pytest.mark.kafka, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

KILLS, LEADER_KILLS, STOPS = (20, 9, 20) if LONG else (5, 3, 8)
ABSENCES = 4


@pytest.mark.parametrize("mode", MODES)
def test_a_single_broker_is_killed_again_and_again(bundle, packets, tmp_path, mode):
    rng = random.Random(21)
    with ApacheKafka(tmp_path / "kafka") as cluster:

        def crash():
            time.sleep(rng.uniform(2.0, 5.0))
            cluster.kill()
            time.sleep(rng.uniform(0.2, 2.0))
            cluster.start()

        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        survive(rig, repeat(packets, 600 + 500 * KILLS), 100.0, mode, KILLS, crash)


@pytest.mark.parametrize("mode", MODES)
def test_a_broker_is_away_for_longer_than_a_session_again_and_again(bundle, packets, tmp_path, mode):
    """The static member joins again by itself, or is started again by its supervisor. It never takes its own old
    requests for those of another process."""
    rng, session = random.Random(25), float(REAL["session.timeout.ms"]) / 1000.0
    with ApacheKafka(tmp_path / "kafka") as cluster:

        def crash():
            time.sleep(rng.uniform(2.0, 5.0))
            cluster.kill()
            time.sleep(session + rng.uniform(-2.0, 2.0))
            cluster.start()

        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        statuses = survive(rig, repeat(packets, 600 + 500 * ABSENCES), 50.0, mode, ABSENCES, crash)
        assert statuses[1] == 0


@pytest.mark.parametrize("mode", MODES)
def test_the_leaders_of_three_nodes_are_killed(bundle, packets, tmp_path, mode):
    rng = random.Random(22)
    with ApacheKafka(tmp_path / "kafka", nodes=3) as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle, copies=3)

        def crash():
            time.sleep(rng.uniform(3.0, 6.0))
            leader = cluster.leader(rig.source)
            cluster.kill(leader)
            time.sleep(rng.uniform(3.0, 6.0))
            cluster.start_node(leader)

        survive(rig, repeat(packets, 600 + 800 * LEADER_KILLS), 60.0, mode, LEADER_KILLS, crash)


def test_an_order_to_stop_is_followed_in_time_whether_the_broker_is_there_or_not(bundle, packets, tmp_path):
    """Random moments, every fourth of them while the broker is away; then what is left is read: nothing is lost."""
    rng = random.Random(23)
    drain = 5.0
    with ApacheKafka(tmp_path / "kafka") as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        sent = rig.send(repeat(packets, 20_000), spread=0)
        took, statuses = [], []
        for moment in range(STOPS):
            away = moment % 4 == 3
            source = {"until_eos": False, "drain_seconds": drain}
            running = rig.start(source=source, batch={"size": BATCH}, publish=MODES["at-least-once"])
            assert running.assigned.wait(START_SECONDS), running.wait(1)
            time.sleep(rng.uniform(0.0, 2.0))
            if away:
                cluster.kill()
                time.sleep(rng.uniform(0.0, 1.0))
            running.terminate()
            started = time.monotonic()
            status, _, log = running.wait(drain + 60)
            took.append(time.monotonic() - started)
            statuses.append(status)
            assert status in ((0, 1, 75) if away else (0,)), log[-2000:]
            if away:
                cluster.start()
        print(f"ended after {', '.join(f'{seconds:.1f}' for seconds in took)} s with {statuses}")
        assert max(took) < drain + 10.0 + 3.0  # the interpreter's own end, on a busy machine
        rig.consume()
        done = rig.outcome(sent)
        print(f"{STOPS} stops, {sent} alerts: {done.lost} lost, {done.duplicates} twice")
        assert done.lost == 0
        assert done.duplicates <= STOPS * REPEATED


PROTOCOLS = {"classic": REAL, "consumer": {"group.protocol": "consumer"}}  # the latter is Kafka 4's own, of KIP-848


class Member:
    """A member of the group with a name of its own, which its transactional id is made of."""

    def __init__(self, rig: Rig, name: str, mode: str):
        publish = {**MODES[mode], "transactional_id": ""}
        self.running = rig.start(source={"until_eos": False, "instance": name}, batch={"size": BATCH}, publish=publish)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mode", MODES)
def test_members_come_and_go(apache_kafka, bundle, packets, tmp_path, mode, protocol):
    """Three members: one is killed, one leaves, both come back, while alerts flow."""
    rig = Rig(apache_kafka.address, PROTOCOLS[protocol], tmp_path, bundle, partitions=4)
    feed = Feed(rig, repeat(packets, 2500), 100.0)
    members = [Member(rig, name, mode) for name in ("one", "two", "three")]
    for member in members:
        assert member.running.assigned.wait(START_SECONDS), member.running.wait(1)
    feed.start()
    time.sleep(3.0)
    members[0].running.kill()
    time.sleep(3.0)
    members[1].running.terminate()
    assert members[1].running.wait()[0] == 0
    time.sleep(3.0)
    members[:2] = [Member(rig, name, mode) for name in ("one", "two")]
    for member in members:
        assert member.running.assigned.wait(START_SECONDS), member.running.wait(1)
    feed.join(180)
    assert feed.error is None
    wait_until_committed(rig, feed.sent)
    for member in members:
        member.running.terminate()
    for member in members:
        status, report, log = member.running.wait()
        assert status == 0, log[-2000:]
        assert report["ledger"]["in_flight"] == 0
    done = rig.outcome(feed.sent)
    print(f"{protocol}, {mode}, {feed.sent} alerts: {done.lost} lost, {done.duplicates} twice")
    assert done.lost == 0
    assert done.duplicates <= (0 if mode == "exactly-once" else 4 * REPEATED)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_member_that_slept_past_its_session_doubles_nothing(apache_kafka, bundle, packets, tmp_path, protocol):
    """Exactly once: it is stopped amid its work, another one takes over, and it goes on."""
    rig = Rig(apache_kafka.address, PROTOCOLS[protocol], tmp_path, bundle, partitions=2)
    feed = Feed(rig, repeat(packets, 3000), 150.0)
    sleeper = Member(rig, "sleeper", "exactly-once")
    assert sleeper.running.assigned.wait(START_SECONDS), sleeper.running.wait(1)
    feed.start()
    time.sleep(2.0)
    sleeper.running.send_signal(signal.SIGSTOP)
    other = Member(rig, "other", "exactly-once")
    assert other.running.assigned.wait(START_SECONDS), other.running.wait(1)
    time.sleep(8.0)  # past the session of six seconds
    sleeper.running.send_signal(signal.SIGCONT)
    feed.join(180)
    assert feed.error is None
    wait_until_committed(rig, feed.sent)
    other.running.terminate()
    status, _, log = other.running.wait()
    assert status == 0, log[-2000:]
    sleeper.running.terminate()
    status, _, log = sleeper.running.wait()
    done = rig.outcome(feed.sent)
    print(f"{protocol}, {feed.sent} alerts: {done.lost} lost, {done.duplicates} twice; the sleeper ended with {status}")
    assert status >= 0, log[-2000:]
    assert (done.lost, done.duplicates) == (0, 0)


def delete_before(cluster: ApacheKafka, topic: str, offsets: dict[int, int]) -> None:
    """As retention does: the log of each partition then begins at this offset."""
    admin = Admin(cluster.settings())
    wanted = [TopicPartition(topic, partition, offset) for partition, offset in offsets.items()]
    for future in admin.delete_records(wanted).values():
        future.result(30)


def test_what_retention_deleted_is_counted_exactly(apache_kafka, bundle, packets, tmp_path):
    rng = random.Random(24)
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=2)
    expected, sent, never_read = Counter(), 0, 0
    for number in range(6):
        sent += rig.send(repeat(packets, 200))
        begins, expected_now = {}, Counter()
        for partition in range(2):
            at = committed(rig)[partition]
            begins[partition] = at + rng.randrange(1, 90)
            if number:  # in the first round the group has read nothing, and so lost nothing
                expected_now[partition] = begins[partition] - at
        delete_before(apache_kafka, rig.source, begins)
        expected += expected_now
        total = rig.consume()
        for partition in range(2):
            assert total.ledger.entries[rig.source, partition].expired == expected_now[partition]
        never_read += sum(begins.values()) if not number else 0
    done = rig.outcome(sent)
    print(f"10 gaps: {expected.total()} offsets deleted")
    assert done.lost == expected.total() + never_read
    assert done.duplicates == 0


def test_retention_overtakes_a_consumer_that_runs(apache_kafka, bundle, packets, tmp_path, monkeypatch):
    """The position is within the log when the partition is assigned, and outside it later: also counted exactly."""
    from alert_broker.stream.stages import Stages

    little = {"queued.max.messages.kbytes": 16, "fetch.message.max.bytes": 16_000}  # read ahead
    rig = Rig(apache_kafka.address, REAL | little, tmp_path, bundle, partitions=1)
    sent, stats = rig.send(repeat(packets, 2000)), Stats()
    real = Stages.decode

    def slow(self, values):
        time.sleep(0.1)
        return real(self, values)

    monkeypatch.setattr(Stages, "decode", slow)
    with rig.running(stats, batch={"size": 20}):
        wait_for(lambda: stats.ledger.total().published >= 100, START_SECONDS)
        delete_before(apache_kafka, rig.source, {0: 1500})
        wait_for(lambda: committed(rig)[0] >= sent, STUCK_SECONDS)
    total, done = stats.ledger.total(), rig.outcome(sent)
    print(f"{total.expired} of {sent} deleted while the consumer ran")
    assert total.expired > 0
    assert total.consumed + total.expired == sent
    assert done.lost == total.expired


def test_gaps_of_transactions_are_no_losses(apache_kafka, bundle, packets, tmp_path):
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=1)
    producer = Producer({**apache_kafka.settings(), "transactional.id": rig.name, "message.max.bytes": 8_388_608})
    producer.init_transactions(30)
    for number in range(20):  # every other one is aborted: its messages and both kinds of markers leave gaps
        producer.begin_transaction()
        for value in repeat(packets, 5):
            producer.produce(rig.source, value, partition=0)
        producer.flush(30)
        (producer.commit_transaction if number % 2 else producer.abort_transaction)(30)
    total = rig.consume().ledger.total()
    assert (total.consumed, total.published, total.expired) == (50, 50, 0)
    assert committed(rig)[0] >= 100  # there were gaps


def send_by_key(settings: dict[str, str], topic: str, values: list[bytes]) -> None:
    """One message for each value to partition 0; five messages after each other have five different keys."""
    producer = Producer(settings | {"message.max.bytes": 8_388_608})
    for number, value in enumerate(values):
        producer.produce(topic, value, key=b"%d" % (number % 5), partition=0)
    assert producer.flush(30) == 0


def wait_for_compaction(cluster: ApacheKafka, rig: Rig, filler: bytes, most: int) -> None:
    """Until no more than so many messages are left. A message now and then closes the segment, which can then be
    compacted."""
    deadline = time.monotonic() + STUCK_SECONDS
    while len(rig.read(rig.source)) > most:
        assert time.monotonic() < deadline
        time.sleep(1.0)
        send_by_key(cluster.settings(), rig.source, [filler])


def test_gaps_of_compaction_are_no_losses(apache_kafka, bundle, packets, tmp_path):
    """What compaction removed behind the committed offset is not counted. Planted: what deletion removed there is."""
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=1)
    compacted = {"cleanup.policy": "compact", "segment.ms": "200", "min.cleanable.dirty.ratio": "0.01"}
    configure_topic(rig.address, rig.source, compacted)
    send_by_key(apache_kafka.settings(), rig.source, repeat(packets, 100))
    assert rig.consume().ledger.total().consumed == 100
    assert committed(rig) == [100]
    send_by_key(apache_kafka.settings(), rig.source, repeat(packets, 100))
    wait_for_compaction(apache_kafka, rig, packets[0], most=20)
    configure_topic(rig.address, rig.source, {"cleanup.policy": "delete"})  # the log stays as it is from now on
    left = [message.offset() for message in rig.read(rig.source)]
    assert min(left) > 100  # the committed offset is in a gap
    assert max(left) >= 200
    total = rig.consume().ledger.total()
    assert (total.consumed, total.published, total.expired) == (len(left), len(left), 0)
    at = committed(rig)[0]
    send_by_key(apache_kafka.settings(), rig.source, repeat(packets, 10))
    delete_before(apache_kafka, rig.source, {0: at + 3})
    total = rig.consume().ledger.total()
    assert (total.consumed, total.expired) == (7, 3)


def test_a_group_that_has_read_nothing_has_lost_nothing(apache_kafka, bundle, packets, tmp_path):
    """The log begins at 30 when the group comes first. Planted: later, 30 that it would have read are gone."""
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=1)
    rig.send(repeat(packets, 100))
    delete_before(apache_kafka, rig.source, {0: 30})
    assert rig.consume().ledger.total().expired == 0  # nothing was committed: there is no position to lose
    rig.send(repeat(packets, 100))
    delete_before(apache_kafka, rig.source, {0: 130})
    assert rig.consume().ledger.total().expired == 30


def test_on_gap_can_stop(apache_kafka, bundle, packets, tmp_path):
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=1)
    rig.send(repeat(packets, 50))
    rig.consume()
    rig.send(repeat(packets, 50))
    delete_before(apache_kafka, rig.source, {0: 70})
    running = rig.start(source={"until_eos": True, "on_gap": "stop"})
    status, report, log = running.wait()
    assert status == 1
    assert "retention deleted 20 offsets" in log.splitlines()[-1]
    assert report["ledger"]["total"]["expired"] == 20
