"""What happens around a real Apache Kafka while the consumer works: the broker is away, its disk is full, a topic is
made again, copies are missing, its clock differs.

Minutes of work, by `make test-kafka`. The consumer is started again when it ends with status 1 or 75, as a supervisor
does it. Nothing is lost, and the consumer continues without help.
"""

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from alert_broker.stream.clients import Admin
from edgekit.errors import EdgekitError
from tests.alert_broker.conftest import REAL
from tests.alert_broker.stream.rig import START_SECONDS, Rig, position, repeat
from tests.alert_broker.stream.supervised import (
    LONG,
    MODES,
    STUCK_SECONDS,
    Supervised,
    check,
    check_said_once_a_minute,
    wait_until_committed,
)
from tests.alert_broker.stream.test_faults import committed
from tests.apache_kafka import ApacheKafka, missing
from tests.brokers import configure_topic, create_topics

pytestmark = [pytest.mark.kafka, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]

AWAY_SECONDS = 600.0 if LONG else 60.0
GROWTH = 150_000_000  # bytes: what is read ahead, the queues of the stages, and what is sent and not acknowledged
HOUR = 3600


def wait_for_work(rig: Rig, supervised: Supervised, sent: int) -> None:
    """Until the consumer is amid its work."""
    deadline = time.monotonic() + START_SECONDS
    while sum(committed(rig)) == 0:
        supervised.look()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert sum(committed(rig)) < sent, "all is done before the weather begins"


def test_a_broker_that_is_away_at_the_start_is_waited_for(bundle, packets, tmp_path):
    with ApacheKafka(tmp_path / "kafka") as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        sent = rig.send(repeat(packets, 200))
        cluster.stop()
        running = rig.start()
        time.sleep(AWAY_SECONDS)
        assert running.running
        said = running.log
        assert sum("the broker does not answer" in line for line in said) >= AWAY_SECONDS // 60
        check_said_once_a_minute(said, AWAY_SECONDS)
        cluster.start()
        status, _, log = running.wait(START_SECONDS)
        assert status == 0, log[-2000:]
        done = rig.outcome(sent)
        assert (done.lost, done.duplicates) == (0, 0)


def test_a_log_that_repeats_itself_every_second_is_noticed():
    """Planted, for the test above."""

    def lines(text: str, number: int, level: str = "warning") -> list[str]:
        return [json.dumps({"level": level, "message": text.format(k)}) for k in range(number)]

    check_said_once_a_minute(lines("Connection refused (after {} ms)", 2), 60.0)
    check_said_once_a_minute(lines("10 s, 300 alerts/s", 60, "info"), 60.0)
    with pytest.raises(AssertionError, match="Connection refused"):
        check_said_once_a_minute(lines("Connection refused (after {} ms)", 60), 60.0)
    with pytest.raises(AssertionError, match="number 59"):
        check_said_once_a_minute(lines("number {}", 60), 60.0)


@pytest.mark.parametrize("mode", MODES)
def test_a_broker_that_is_away_amid_the_work(bundle, packets, tmp_path, mode):
    with ApacheKafka(tmp_path / "kafka") as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        sent = rig.send(repeat(packets, 20_000), spread=0)
        supervised = Supervised(rig, mode)
        wait_for_work(rig, supervised, sent)
        before, lines = supervised.watch(2.0), len(supervised.log)
        cluster.kill()
        most = supervised.watch(AWAY_SECONDS)
        said = supervised.log[lines:]
        cluster.start()
        supervised.wait_until_committed(sent)
        supervised.end()
        print(
            f"{mode}, away for {AWAY_SECONDS:.0f} s: {before / 1e6:.0f} MB before, {most / 1e6:.0f} MB at most, "
            f"{len(said)} lines"
        )
        check_said_once_a_minute(said, AWAY_SECONDS)
        assert most < before + GROWTH
        assert supervised.statuses.total() <= 1  # the process that was amid a batch; the next one waits for the broker
        check(supervised, sent, mode, 1)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    folder.mkdir()
    made = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    done = subprocess.run(made, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no byte on the disk."""
    path = folder / "ballast"
    with path.open("wb", buffering=0) as stream:
        for size in (1 << 20, 4096):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                pass
    assert shutil.disk_usage(folder).free < 4096
    return path


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_at_the_broker(bundle, packets, tmp_path, mode):
    """The broker ends, as Kafka does when it cannot write. Somebody makes room and starts it again."""
    cluster = ApacheKafka(tmp_path / "kafka")
    with small_disk(cluster.data(0), 512), cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        sent = rig.send(repeat(packets, 6000), spread=0)
        supervised = Supervised(rig, mode)
        wait_for_work(rig, supervised, sent)
        ballast = fill(cluster.data(0))
        deadline = time.monotonic() + STUCK_SECONDS
        while cluster.running(0):
            supervised.look()
            assert time.monotonic() < deadline, "the broker still runs"
            time.sleep(0.2)
        supervised.watch(10.0)
        ballast.unlink()
        cluster.kill()
        cluster.start()
        stopped_at = sum(committed(rig))
        supervised.wait_until_committed(sent)
        supervised.end()
        print(f"the disk was full at {stopped_at} of {sent}")
        assert stopped_at < sent
        check(supervised, sent, mode, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_leader_without_enough_copies_in_sync(bundle, packets, tmp_path, mode):
    """The results need three copies, and one of three nodes is away for longer than `publish.seconds`."""
    with ApacheKafka(tmp_path / "kafka", nodes=3) as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle, copies=3)
        configure_topic(rig.address, rig.results, {"min.insync.replicas": "3"})
        sent = rig.send(repeat(packets, 6000), spread=0)
        supervised = Supervised(rig, mode)
        wait_for_work(rig, supervised, sent)
        cluster.kill(2)
        before = -1
        while before != (before := sum(committed(rig))):  # what was published before is still being committed
            supervised.watch(15.0)
        supervised.watch(AWAY_SECONDS)
        after = sum(committed(rig))
        cluster.start_node(2)
        supervised.wait_until_committed(sent)
        supervised.end()
        print(f"{before} of {sent} committed at first, {after} after {AWAY_SECONDS:.0f} s")
        assert before == after < sent  # nothing could be published
        check(supervised, sent, mode, 1 + supervised.statuses.total())


def delete_topic(address: str, topic: str) -> None:
    admin = Admin({"bootstrap.servers": address})
    admin.delete_topics([topic])[topic].result(30)
    deadline = time.monotonic() + 30
    while topic in admin.list_topics(timeout=10).topics:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("mode", MODES)
def test_a_topic_is_deleted_and_made_again_with_fewer_partitions(apache_kafka, bundle, packets, tmp_path, mode):
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=3)
    first = rig.send(repeat(packets, 300))
    supervised = Supervised(rig, mode)
    supervised.wait_until_committed(first)
    delete_topic(rig.address, rig.source)
    supervised.watch(15.0)
    create_topics(rig.address, {rig.source: 1})
    rig.partitions = 1
    second = rig.send(repeat(packets, 200))
    supervised.wait_until_committed(second)
    supervised.end()
    assert set(supervised.statuses) <= {1}, supervised.statuses
    assert len(rig.read(rig.results)) == first + second


@pytest.mark.parametrize("more", [20, 400], ids=["shorter", "longer"])
def test_a_topic_is_made_again_before_the_consumer_notices(apache_kafka, bundle, packets, tmp_path, more):
    """The new topic ends before, or behind, the offset at which the consumer would go on."""
    rig = Rig(apache_kafka.address, REAL, tmp_path, bundle, partitions=1)
    first = rig.send(repeat(packets, 100))
    supervised = Supervised(rig, "at-least-once")
    supervised.wait_until_committed(first)
    supervised.running.suspend()
    delete_topic(rig.address, rig.source)
    create_topics(rig.address, {rig.source: 1})
    second = rig.send(repeat(packets, more))
    supervised.running.resume()
    wait_until_committed(rig, second, supervised.look)
    supervised.watch(15.0)
    supervised.end()
    offsets = Counter(position(message)[2] for message in rig.read(rig.results))
    print(f"{offsets.total()} results of {first} + {second}")
    twice = range(min(first, second))  # offsets that both topics had
    assert [offset for offset in twice if offsets[offset] < 2] == []
    assert sorted(offsets) == list(range(max(first, second)))


@pytest.fixture
def moved_clock(tmp_path):
    """moved_clock(seconds): the environment in which a process has a clock that differs from ours."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the clock of a process cannot be moved")
    library, source = tmp_path / "clock.so", Path(__file__).parents[2] / "clock.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)

    def environment(seconds: int) -> dict[str, str]:
        return {"LD_PRELOAD": str(library), "CLOCK_SHIFT_SECONDS": str(seconds)}

    shown = subprocess.run(["date", "+%s"], env={**os.environ, **environment(HOUR)}, capture_output=True, check=True)
    assert abs(int(shown.stdout) - time.time() - HOUR) < 60
    return environment


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seconds", [-HOUR + 60, HOUR], ids=["behind", "ahead"])
def test_a_broker_whose_clock_differs_by_an_hour(bundle, packets, tmp_path, moved_clock, seconds, mode):
    with ApacheKafka(tmp_path / "kafka", environment=moved_clock(seconds)) as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        sent = rig.send(repeat(packets, 300))
        total = rig.consume(publish=MODES[mode]).ledger.total()
        done = rig.outcome(sent)
        assert (done.lost, done.duplicates) == (0, 0)
        assert (total.consumed, total.published, total.expired) == (sent, sent, 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_clock_that_the_broker_does_not_accept_is_named(bundle, packets, tmp_path, moved_clock, mode):
    """Kafka refuses records that come from more than an hour later."""
    with ApacheKafka(tmp_path / "kafka", environment=moved_clock(-2 * HOUR)) as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        configure_topic(rig.address, rig.source, {"message.timestamp.type": "LogAppendTime"})
        sent = rig.send(repeat(packets, 50))
        with pytest.raises(EdgekitError, match=r"the clock of this machine .* message\.timestamp\.after\.max\.ms"):
            rig.consume(publish=MODES[mode])
        assert sum(committed(rig)) == 0
        assert rig.outcome(sent).results == 0
