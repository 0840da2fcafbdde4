"""A consumer that is told to stop while it starts ends at once, with a line and the status that its help names."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import tomli_w

from tests.alert_broker.stream.rig import START_SECONDS, Running
from tests.alert_broker.stream.waiting import seconds_to_end
from tests.brokers import free_port

SERVED_SECONDS = 2.0  # from the signal to the end of the process
BEGUN = "from edgekit.cli import main; print('begun', flush=True); main()"


@pytest.fixture
def started(rig_tables, tmp_path):
    """A consumer that has begun to start, and whose broker never answers."""
    path = tmp_path / "broker.toml"
    path.write_text(tomli_w.dumps(rig_tables))
    command = [sys.executable, "-c", BEGUN, "alerts", "consume", "--config", str(path), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "begun\n"
        yield process
        process.kill()


def stopped(process, sent) -> str:
    """Send the signal, check how the consumer ends, and return its standard output."""
    process.send_signal(sent)
    took = seconds_to_end(process)
    out, err = process.communicate()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[sent], err
    assert err.strip().splitlines()[-1] == "edgekit: stopped"
    assert "Traceback" not in err
    assert took < SERVED_SECONDS
    return out


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("seconds", [0.3, 0.6, 1.0, 2.0], ids=str)
def test_while_it_imports(seconds, sent, started):
    time.sleep(seconds)
    stopped(started, sent)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_while_it_waits_for_its_broker(sent, started):
    assert any("the broker does not answer" in line for line in started.stderr)
    report = json.loads(stopped(started, sent))
    assert report["ledger"]["total"]["consumed"] == 0
    assert report["failed"]


@pytest.fixture
def rig_tables(bundle):
    """The configuration of a consumer whose broker is away."""
    return {
        "source": {"topics": ["x"], "group": "x"},
        "model": {"bundle": str(bundle)},
        "output": [{"topic": "y"}],
        "kafka": {"bootstrap.servers": f"127.0.0.1:{free_port()}"},
    }


@pytest.mark.parametrize("share", [0.35, 0.5, 0.65, 0.8, 0.95])
def test_while_it_opens_models_and_joins_the_group(share, rig, seconds_to_start):
    """share: of the time that it takes to start."""
    running: Running = rig.start(source={"until_eos": False})
    time.sleep(share * seconds_to_start)
    assert running.running, running.wait()
    running.terminate()
    took = seconds_to_end(running.process)
    status, report, log = running.wait()
    begun = status != -signal.SIGTERM or log  # else Python itself was still starting, on a machine that is busy now
    assert status in (0, 143) or not begun, log
    assert not begun or (status == 0) == ("edgekit: stopped" not in log), log
    assert not report or report["ledger"]["total"]["consumed"] == 0  # none if it was still importing
    assert took < SERVED_SECONDS


@pytest.fixture(scope="module")
def seconds_to_start(broker, bundle, tmp_path_factory):
    """Until a consumer has partitions."""
    from tests.alert_broker.stream.rig import Rig

    address, settings = broker
    began = time.monotonic()
    running = Rig(address, settings, tmp_path_factory.mktemp("start"), bundle).start(source={"until_eos": False})
    assert running.assigned.wait(START_SECONDS), running.wait(1)
    found = time.monotonic() - began
    running.terminate()
    assert running.wait()[0] == 0
    return found
