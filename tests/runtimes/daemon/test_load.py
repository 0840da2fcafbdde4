"""Many clients at once, also such that leave, send nonsense or read slowly: nothing is lost, nothing leaks."""

import asyncio
import time
from pathlib import Path

import pytest

from tools import bench_serve as bench


def descriptors():
    return len([*Path("/proc/self/fd").iterdir()])


def test_every_request_ends_and_nothing_is_held(start):
    with start() as running:
        warm = asyncio.run(bench.load(running.port, "toy", clients=8, requests=16))
        assert warm.lost == []
        before = descriptors()
        outcome = asyncio.run(bench.load(running.port, "toy", clients=24, requests=200, seed=1))
        assert outcome.lost == []
        ends = outcome.ends
        assert sum(ends.values()) == 200
        assert ends["stream: done"] > 60
        assert ends["whole: 200"] > 10
        assert ends["slow: done"] > 0
        assert sum(number for end, number in ends.items() if end.startswith("malformed: 4")) > 10
        assert not any(end.endswith((": killed", ": 500")) for end in ends)
        assert asyncio.run(bench.settled(running.port, "toy")) == ""
        assert running.settled()
        deadline = time.monotonic() + 30.0
        while descriptors() > before:  # a connection without a request is kept for some seconds
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_more_than_the_queue_holds_is_refused_and_not_lost(start):
    with start(limits={"queue": 2}) as running:
        asyncio.run(bench.load(running.port, "toy", clients=1, requests=4))
        outcome = asyncio.run(bench.load(running.port, "toy", clients=24, requests=120, seed=2, tokens=200))
        assert outcome.lost == []
        assert outcome.ends["stream: 503"] > 0
        assert outcome.ends["stream: done"] > 0
        assert running.settled()


def test_a_lost_request_and_a_held_block_are_seen(start, monkeypatch):
    """The twin: a daemon that forgets an answer, and gives blocks back late."""
    monkeypatch.setattr(bench, "SECONDS", 1.5)
    with start() as running:
        asyncio.run(bench.load(running.port, "toy", clients=1, requests=4))
        with monkeypatch.context() as patch:
            patch.setattr(running.queue(), "_tell", lambda pending, event: None)
            outcome = asyncio.run(bench.load(running.port, "toy", clients=4, requests=8, seed=1))
        assert any("TimeoutError" in item for item in outcome.lost)
        blocks = running.queue().engine.blocks
        blocks.reserve([(10**6, 16)])
        assert asyncio.run(bench.settled(running.port, "toy", seconds=0.5)) == "1 blocks and 0 answers are held"
        blocks.remove(10**6)


def test_a_scheduler_that_fails_ends_its_answers_and_the_next_request_loads_the_model_again(start, monkeypatch):
    body = {"model": "toy", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    with start() as running:
        assert running.post("/v1/chat/completions", body).status == 200
        broken = running.queue()
        monkeypatch.setattr(broken.job.scheduler, "lengths", lambda: 1 / 0)
        assert running.post("/v1/chat/completions", body).status == 500
        assert broken.broken
        assert running.post("/v1/chat/completions", body).status == 200
        assert running.queue() is not broken


def test_the_report_fails_for_each_problem(capsys):
    def status(held="", after=5, lost=()):
        return bench.report(bench.Outcome(lost=list(lost)), 1.0, held, 5, after, 0)

    assert status() == 0
    assert status(held="1 blocks") == status(after=6) == status(lost=["request 3"]) == 1
    assert capsys.readouterr().out.count("NOT AS IT MUST BE") == 3


@pytest.fixture
def service(model_files):
    found = bench.Service(str(model_files[0]), [])
    yield found
    found.close()


def test_a_daemon_that_is_killed_starts_again_and_only_the_requests_of_that_moment_are_cut(service, model_files):
    first = service.process.pid
    load = {"clients": 12, "requests": 120, "seed": 3, "service": service, "kills": 1}
    outcome = asyncio.run(bench.load(service.port, model_files[0].stem, **load))
    assert outcome.lost == []
    assert sum(outcome.ends.values()) == 120
    assert len(service.kills) == 1
    assert service.process.pid != first
    assert 1 <= sum(number for end, number in outcome.ends.items() if end.endswith(": killed")) <= 12
    assert asyncio.run(bench.settled(service.port, model_files[0].stem)) == ""


def test_a_kill_excuses_no_request_that_came_later(service, model_files, monkeypatch):
    """The twin: the same cut requests are lost ones if the kill came before they began."""
    load = {"clients": 8, "requests": 40, "seed": 4, "service": service, "kills": 1}
    monkeypatch.setattr(service, "kills", type("Unnoted", (list,), {"append": lambda self, at: None})([0.0]))
    outcome = asyncio.run(bench.load(service.port, model_files[0].stem, **load))
    assert len(outcome.lost) >= 1
