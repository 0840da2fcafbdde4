"""The whole stream on a real broker: what comes out is what classifying the same packets as files gives, each alert has
one fate, and the ledger says so."""

import functools
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from confluent_kafka import TopicPartition

from alert_broker import containers
from alert_broker.classify import classify_files
from alert_broker.containers import WIRE_HEADER
from alert_broker.gaussian_process import GaussianProcess
from alert_broker.stream.clients import open_consumer
from alert_broker.stream.dead_letters import ATTEMPTS, REASON, SCHEMA_ID, STACK, headers_of
from alert_broker.stream.health import health, readiness
from alert_broker.stream.ledger import Ledger
from alert_broker.stream.redrive import redrive
from alert_broker.stream.run import run
from alert_broker.stream.source import Source
from alert_broker.stream.stages import Stages
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError
from tests.alert_broker.stream.rig import START_SECONDS, datum_of, position, repeat
from tests.alert_broker.stream.waiting import seconds_to_end, wait_for
from tests.brokers import create_topics

BROKEN = b"Obj\x01 and then nothing that Avro knows"


def test_results_are_those_of_files(rig, packets, bundle, tmp_path):
    import pyarrow.parquet as pq

    from edgekit.bundle.store import open_bundle

    rig.send(packets)
    stats = rig.consume()
    total = stats.ledger.total()
    assert (total.consumed, total.published, total.filtered, total.dead_lettered) == (40, 40, 0, 0)
    files = tmp_path / "files"
    files.mkdir()
    for number, packet in enumerate(packets):
        (files / f"{number:03}.avro").write_bytes(packet)
    classify_files([files], tmp_path / "out.parquet", bundle=open_bundle(bundle))
    expected = {row["alert_id"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    got = {}
    for message in rig.read(rig.results):
        row = json.loads(message.value())
        topic, partition, offset = position(message)
        assert (row["file"], row["offset"]) == (f"{topic}[{partition}]", offset)
        assert message.key() == row["object_id"].encode()
        got[row["alert_id"]] = row
    assert set(got) == set(expected)
    for alert, row in got.items():
        assert row["best_class"] == expected[alert]["best_class"]
        assert row["best_probability"] == pytest.approx(expected[alert]["best_probability"], abs=1e-5)
        assert row["fresh"] is True


def test_every_alert_has_one_fate(rig, packets):
    values = [*packets, BROKEN, b"", packets[0][:-100], b"\x00\x00\x01\x86\x9f" + packets[1]]
    rig.send(values)
    kept = "n_det_g > 3"
    stats = rig.consume(output=[{"topic": rig.results, "format": "json", "where": kept}])
    total = stats.ledger.total()
    rows = [json.loads(message.value()) for message in rig.read(rig.results)]
    assert all(row["n_det_g"] > 3 for row in rows)
    assert 0 < total.published == len(rows) < 40
    assert (total.consumed, total.dead_lettered, total.filtered) == (44, 4, 40 - len(rows))
    dead = rig.read(rig.dead)
    # librdkafka gives an empty payload as None
    assert Counter(message.value() or b"" for message in dead) == Counter(values[40:])
    dead_letters = {message.value(): dict(headers_of(message)) for message in dead}
    assert b"header" in dead_letters[BROKEN][REASON]
    assert dead_letters[values[43]][SCHEMA_ID] == b"99999"
    assert b"99999" in dead_letters[values[43]][REASON]


def test_filtered_alerts_are_committed_too(rig, packets):
    rig.send(packets)
    stats = rig.consume(output=[{"topic": rig.results, "where": "n_det_g < 0"}])
    assert stats.ledger.total().filtered == 40
    assert rig.read(rig.results) == []
    consumer = open_consumer({**rig.kafka, "group.id": rig.name})
    committed = consumer.committed([TopicPartition(rig.source, number) for number in range(3)], 10)
    consumer.close()
    assert sum(item.offset for item in committed) == 40
    again = rig.consume()
    assert again.ledger.total().consumed == 0


def test_an_alert_that_breaks_the_program_takes_no_other_along(rig, packets, monkeypatch):
    """A classifier that fails on one object, as a bug would: that alert is a dead letter with a stack digest."""
    rig.send(packets)
    real = Stages.classify

    def classify(self, alerts):
        inner = self.classifiers

        def failing(batch):
            if batch.alerts["object_id"][0].as_py() in bad or bad & set(batch.alerts["object_id"].to_pylist()):
                raise ZeroDivisionError("of the test")
            return inner(batch)

        failing.schema = inner.schema
        bad = {"unlucky"} if not names else {names[0]}
        names.extend(name for batch in alerts for name in batch.alerts["object_id"].to_pylist() if not names)
        bad = {names[0]}
        self.classifiers = failing
        try:
            return real(self, alerts)
        finally:
            self.classifiers = inner

    names: list[str] = []
    monkeypatch.setattr(Stages, "classify", classify)
    total = rig.consume().ledger.total()
    assert (total.published, total.dead_lettered) == (39, 1)
    (dead_letter,) = rig.read(rig.dead)
    headers = dict(headers_of(dead_letter))
    assert b"ZeroDivisionError: of the test" in headers[REASON]
    assert len(headers[STACK]) == 16
    assert dead_letter.value() in packets


@pytest.mark.parametrize("error", [ValueError, IndexError])
def test_an_alert_that_breaks_decoding_takes_no_other_along(rig, packets, monkeypatch, error):
    """A survey's reader that fails on a whole batch because of one alert in it."""
    from alert_broker.surveys.ztf import Ztf

    rig.send(packets)
    real, names = Ztf.extract, []

    def extract(self, alerts):
        found = real(self, alerts)
        names.extend(found.object_id[3:4] if not names else ())
        if names[0] in found.object_id:
            raise error("of the test")
        return found

    monkeypatch.setattr(Ztf, "extract", extract)
    total = rig.consume().ledger.total()
    assert (total.published, total.dead_lettered) == (39, 1)
    (dead_letter,) = rig.read(rig.dead)
    assert b"of the test" in dict(headers_of(dead_letter))[REASON]


def test_too_many_dead_letters_stop_the_consumer_before_they_are_committed(rig, packets):
    rig.send([*packets[:10], *[BROKEN] * 30])
    limits = {"topic": rig.dead, "max_consecutive": 5}
    with pytest.raises(EdgekitError, match="5 alerts in a row are dead letters"):
        rig.consume(dead_letters=limits)
    done = rig.outcome(40)
    assert done.dead == 0
    total = rig.consume().ledger.total()  # the cause is found, the limits are as before
    assert total.consumed == 40 - done.results
    after = rig.outcome(40)
    assert (after.lost, after.duplicates, after.dead) == (0, 0, 30)


def test_redriven_letters_are_read_again(rig, packets):
    """Schema 99999 is unknown until it is not."""
    rig.send([*packets[:5], *(b"\x00\x00\x01\x86\x9f" + packet for packet in packets[:7])])
    rig.consume()
    assert len(rig.read(rig.dead)) == 7
    done = redrive(
        rig.config().kafka_settings(), rig.config().dead_letters, group=f"{rig.name}-redrive", reason="no such reason"
    )
    assert (done.sent, done.passed_over) == (0, 7)
    done = redrive(rig.config().kafka_settings(), rig.config().dead_letters, group=f"{rig.name}-again", reason="99999")
    assert (done.sent, done.passed_over) == (7, 0)
    again = redrive(rig.config().kafka_settings(), rig.config().dead_letters, group=f"{rig.name}-again")
    assert (again.sent, again.passed_over) == (0, 0)
    total = rig.consume().ledger.total()
    assert (total.consumed, total.dead_lettered) == (7, 7)  # nothing was fixed in between
    attempts = sorted(int(dict(headers_of(dead_letter))[ATTEMPTS]) for dead_letter in rig.read(rig.dead))
    assert attempts == [1] * 7 + [2] * 7


def test_start_at_offsets_and_times(rig, packets):
    rig.send(packets[:12])
    time.sleep(0.05)
    moment = time.time()
    time.sleep(0.05)
    rig.send(packets[12:21])
    at = {"group": f"{rig.name}-offsets", "start_at": "0=3,1=4,2=7"}
    assert rig.consume(source=at).ledger.total().consumed == 4 + 3 + 0
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1000):03}Z"
    at = {"group": f"{rig.name}-times", "start_at": stamp}
    assert rig.consume(source=at).ledger.total().consumed == 9
    with pytest.raises(EdgekitError, match="expected earliest, latest, a time"):
        rig.consume(source={"start_at": "yesterday"})
    with pytest.raises(EdgekitError, match="names partition 9"):
        rig.consume(source={"start_at": "9=0"})


def test_a_topic_that_is_not_there_is_said(rig):
    with pytest.raises(EdgekitError, match="is not there"):
        rig.consume(source={"topics": [f"{rig.name}-nowhere"], "start_at": "0=0"})


def test_an_unbalanced_ledger_is_an_error(rig, packets, monkeypatch):
    """Planted: an alert is counted as read and never as anything else."""
    rig.send(packets[:6])
    real = Ledger.add

    def forgetful(self, partition, **columns):
        real(
            self, partition, **{name: number - (name == "published" and number > 1) for name, number in columns.items()}
        )

    monkeypatch.setattr(Ledger, "add", forgetful)
    with pytest.raises(EdgekitError, match="does not add up"):
        rig.consume()


def test_sigterm_drains_and_commits(rig, packets):
    sent = rig.send(repeat(packets, 120))
    running = rig.start(source={"until_eos": False})
    wait_for(lambda: rig.read(rig.results) or not running.running, START_SECONDS)
    assert running.running, running.wait()
    running.terminate()
    status, report, log = running.wait()
    assert status == 0, log
    total = report["ledger"]["total"]
    assert report["ledger"]["in_flight"] == 0
    assert total["consumed"] == total["published"] > 0
    rig.consume()
    after = rig.outcome(sent)
    assert (after.lost, after.duplicates) == (0, 0)


def test_who_is_stuck_after_having_been_at_the_end_is_found_out(rig, packets, monkeypatch):
    """Planted: from some time on the consumer fetches nothing, and nothing says so. It had reached the end before."""
    stats, sources = Stats(), []
    real = Source.poll

    def poll(self, size, seconds):
        sources[:] = [self]
        return real(self, size, seconds)

    monkeypatch.setattr(Source, "poll", poll)
    rig.send(packets[:6])
    with rig.running(stats):
        wait_for(lambda: stats.ledger.total().published == 6 and sources[0].at_end)
        later = time.monotonic() + 2.5  # it is idle, for longer than it may be stuck
        wait_for(lambda: time.monotonic() > later and health(stats.snapshot(), 2.0)[0])
        consumer = sources[0].consumer
        sources[0].membership.ask(lambda: consumer.pause(consumer.assignment()))
        rig.send(packets[6:36], spread=1)
        wait_for(lambda: not health(stats.snapshot(), 2.0)[0])
        assert not readiness(stats.snapshot(), 2.0)[0]
        answer = health(stats.snapshot(), 2.0)[1]
        assert (answer["status"], answer["in_flight"]) == ("stuck", 0)
        assert answer["lag"] > 0
        sources[0].membership.ask(lambda: consumer.resume(consumer.assignment()))
        wait_for(lambda: stats.ledger.total().published == 36)
        wait_for(lambda: health(stats.snapshot(), 2.0)[0])


@pytest.mark.parametrize("name", ["decode", "classify"])
def test_a_stage_that_is_stuck_is_found_out(rig, packets, monkeypatch, name):
    """Planted: a stage that does not come back."""
    stats, free, real = Stats(), threading.Event(), getattr(Stages, name)

    def stuck(self, values):
        free.wait()
        return real(self, values)

    rig.send(packets[:6])
    with rig.running(stats):
        wait_for(lambda: stats.ledger.total().published == 6)
        monkeypatch.setattr(Stages, name, stuck)
        rig.send(packets[6:12])
        wait_for(lambda: not health(stats.snapshot(), 1.0)[0])
        assert health(stats.snapshot(), 1.0)[1]["in_flight"] > 0
        free.set()
        wait_for(lambda: stats.ledger.total().published == 12)
        wait_for(lambda: health(stats.snapshot(), 1.0)[0])


def test_an_alert_whose_results_no_output_takes_is_one_dead_letter(rig, packets, monkeypatch):
    """Two outputs with the packet in it, and one without, which has its result all the same."""
    other, small = f"{rig.name}-other", f"{rig.name}-small"
    create_topics(rig.address, {other: 1, small: 1})
    outputs = [
        {"topic": topic, "format": "json", "attach": attach}
        for topic, attach in ((rig.results, "packet"), (other, "packet"), (small, "nothing"))
    ]
    chosen = sorted(packets, key=len)
    sizes = [len(packet) for packet in chosen]
    assert sizes[3] < sizes[-3]
    limit = (sizes[3] + sizes[-3]) * 2 // 3  # of base64
    rig.send([*chosen[:4], *chosen[-3:]])
    stats = rig.consume(output=outputs, kafka={"message.max.bytes": limit, "compression.type": "none"})
    total = stats.ledger.total()
    dead_letters = rig.read(rig.dead)
    assert len({position(dead_letter) for dead_letter in dead_letters}) == len(dead_letters) == total.dead_lettered
    refused = [dead_letter for dead_letter in dead_letters if dead_letter.value() in chosen[-3:]]
    assert len(refused) == 3
    for dead_letter in refused:
        reason = dict(headers_of(dead_letter))[REASON].decode()
        assert rig.results in reason
        assert other in reason
    assert len(rig.read(small)) == 7
    assert len(rig.read(rig.results)) == len(rig.read(other)) == total.published
    assert total.published + total.dead_lettered == total.consumed == 7


def test_the_report_says_why_it_failed_and_what_was_given_back(rig, packets):
    rig.send([*packets[:4], *[BROKEN] * 30])
    status, report, log = rig.start(
        batch={"seconds": 1.0}, dead_letters={"topic": rig.dead, "max_consecutive": 5}
    ).wait()  # one batch has all of them
    assert status == 1, log
    assert "5 alerts in a row are dead letters" in report["failed"]
    assert report["ledger"]["in_flight"] == 0
    assert report["ledger"]["revoked"] == 34 - report["ledger"]["total"]["consumed"] > 0


@pytest.mark.parametrize("full", ["size", "bytes"])
def test_a_slow_sink_pauses_and_holds_no_more_than_its_queues(rig, packets, monkeypatch, full):
    from alert_broker.stream.archive import Archive

    monkeypatch.setattr("alert_broker.stream.pipeline.PAUSE_AFTER", 0.05)
    sent = rig.send(repeat(packets, 200))
    most = 0
    paused = False

    def slow(self, rows, positions):
        nonlocal most, paused
        if not paused:  # the first write waits until nothing more is fetched
            wait_for(lambda: stats.paused)
            paused = True
        most = max(most, stats.ledger.total().in_flight)

    monkeypatch.setattr(Archive, "write", slow)
    stats = Stats()
    largest = max(map(len, packets))
    monkeypatch.setattr("alert_broker.stream.source.USUAL_BYTES", largest)
    limit = {"size": 10} if full == "size" else {"bytes": 10 * largest}
    config = rig.config(
        batch={"queue": 1, **limit}, archive={"folder": str(rig.folder / "archive")}, publish={"uncommitted": 2}
    )
    run(config, stats, lambda: False)
    assert paused
    # one in each stage and queue, one that waits, one that came while pausing, and those that are not committed yet
    most_batches = 3 + 3 + 2 + 2
    if full == "size":
        assert most <= 10 * most_batches
    else:
        assert most * min(map(len, packets)) <= 11 * largest * most_batches < sent * min(map(len, packets))
    after = rig.outcome(sent)
    assert (after.lost, after.duplicates) == (0, 0)


def test_an_alert_over_its_time_budget_is_a_dead_letter(rig, packets, long_packet, monkeypatch):
    """10,000 points are fitted as 3,000, which takes several seconds; the others take microseconds."""
    slow = functools.partial(GaussianProcess, max_points=3000, tolerance=0.0)
    monkeypatch.setattr("alert_broker.features.GaussianProcess", slow)
    rig.send([*packets[:10], long_packet, *packets[10:20]])
    total = rig.consume(model={"alert_seconds": 0.5}).ledger.total()
    (letter,) = rig.read(rig.dead)
    assert letter.value() == long_packet
    assert b"did not end within its time budget: 0.5 s" in dict(headers_of(letter))[REASON]
    assert (total.published, total.dead_lettered) == (20, 1)


def test_an_alert_of_ten_thousand_points_is_classified(rig, packets, long_packet):
    rig.send([*packets[:3], long_packet])
    total = rig.consume().ledger.total()
    assert (total.published, total.dead_lettered) == (4, 0)


def test_sigterm_is_served_while_long_light_curves_are_fitted(rig, packets, long_packet):
    """A batch of them takes half a minute. What is in flight is not committed, and is read again."""
    sent = rig.send([*packets[:5], *[long_packet] * 400], spread=1)
    running = rig.start(source={"until_eos": False}, batch={"size": 500, "seconds": 2.0}, model={"reuse": "off"})
    assert running.assigned.wait(START_SECONDS), running.wait(1)
    time.sleep(4.0)  # the batch is closed after two seconds
    running.terminate()
    took = seconds_to_end(running.process)
    status, report, log = running.wait()
    assert status == 0, log
    assert took < 2.0, log
    total = report["ledger"]["total"]
    assert total["revoked"] > 0, report
    assert total["consumed"] == total["published"]
    assert "in flight: they were not committed and will be read again" in log
    done = rig.outcome(sent)
    assert (done.lost, done.duplicates) == (sent - total["published"], 0)


def test_what_is_given_up_is_not_committed(rig, packets, monkeypatch):
    """A stage that hangs is given up at once; batches behind it are not committed either, and nothing is lost."""
    free, real, calls = threading.Event(), Stages.classify, []

    def classify(self, alerts):
        calls.append(1)
        if len(calls) == 3:
            while not free.wait(0.01):
                self._budget.check()
        return real(self, alerts)

    sent = rig.send(repeat(packets, 200))
    monkeypatch.setattr(Stages, "classify", classify)
    stats = rig.consume(lambda: len(calls) == 3, source={"stop_seconds": 0.2}, batch={"size": 20})
    total = stats.ledger.total()
    assert total.published == total.consumed == 40
    assert total.revoked > 0
    free.set()
    rig.consume()
    done = rig.outcome(sent)
    assert (done.lost, done.duplicates) == (0, 0)


def test_one_bad_schema_id_makes_dead_letters_of_its_messages_only(rig, packets, monkeypatch):
    """The registry has no text for schema 7, fails on 8, and has ZTF's under 900, which is also an id of LSST's.
    Without the registry, the messages under 900 are read as LSST's and become dead letters."""
    text = containers._container_metadata(packets[0])[0]["avro.schema"].decode()
    answers = {7: (200, {"schema": None}), 8: (500, {}), 900: (200, {"schema": text})}
    datums = [datum_of(packet) for packet in packets]
    rig.send([WIRE_HEADER.pack(0, number) + datum for datum in datums[:9] for number in (7, 8, 900)])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("alert_broker.stream.registry.DELAYS", (0.0,))
    monkeypatch.setattr("alert_broker.stream.batch_stages.REGISTRY_RETRY", 0.1)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers.get(int(self.path.rpartition("/")[2]) if "ids" in self.path else 0, (200, []))
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    try:
        total = rig.consume(registry={"url": f"http://127.0.0.1:{server.server_port}"}).ledger.total()
    finally:
        server.shutdown()
        server.server_close()
    assert (total.published, total.dead_lettered) == (9, 18)
    ids = Counter(dict(headers_of(letter))[SCHEMA_ID] for letter in rig.read(rig.dead))
    assert ids == {b"7": 9, b"8": 9}
    again = rig.consume(source={"group": f"{rig.name}-without"}).ledger.total()  # the twin
    assert (again.published, again.dead_lettered) == (0, 27)
