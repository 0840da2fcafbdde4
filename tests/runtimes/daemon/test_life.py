"""The daemon as a process: signals, systemd, its command line."""

import configparser
import http.client
import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

from runtimes.daemon import keys, systemd
from tests.certificates import Authority
from tests.conftest import ROOT
from tests.runtimes.daemon.conftest import process

TEXT = {"type": "json_schema", "json_schema": {"name": "text", "schema": {"type": "string", "minLength": 1500}}}
BODY = {"model": "toy", "messages": [{"role": "user", "content": "hello"}], "seed": 1}


@pytest.fixture
def config(tmp_path, model_files):
    """config(...): the path of a file; server: lines of its table [server]."""

    def write(server="", others=""):
        path = tmp_path / "serve.toml"
        path.write_text(
            f'[server]\nlisten = "127.0.0.1:0"\n{server}\n[models.toy]\npath = "{model_files[0]}"\nengine = "torch"\n'
            f'context = 2048\nload = "at-start"\n{others}'
        )
        return path

    return write


def ask(port, method, path, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def begun(port, **change):
    """A stream whose first event has come."""
    connection, answer = ask(port, "POST", "/v1/chat/completions", {**BODY, "stream": True, **change})
    assert answer.status == 200
    return connection, answer, answer.readline()


def events(first, answer):
    lines = [first, *answer.read().splitlines()]
    return [line.removeprefix(b"data: ").strip() for line in lines if line.startswith(b"data: ")]


def test_sigterm_lets_streams_finish(config):
    with process("--config", config()) as (found, port):
        connection, answer, first = begun(port, response_format=TEXT, max_tokens=300)
        found.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert found.poll() is None
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        received = events(first, answer)
        assert received[-1] == b"[DONE]"
        assert json.loads(received[-2])["choices"][0]["finish_reason"] == "length"
        connection.close()
        assert found.wait(20) == 0


def test_a_stream_that_is_longer_than_the_drain_has_a_clear_end(config):
    with process("--config", config("drain_seconds = 0.4")) as (found, port):
        connection, answer, first = begun(port, response_format=TEXT, n=8, temperature=1)
        started = time.monotonic()
        found.send_signal(signal.SIGTERM)
        received = events(first, answer)
        assert json.loads(received[-1])["error"]["code"] == "stopping"
        connection.close()
        assert found.wait(20) == 0
        assert 0.3 < time.monotonic() - started < 10


def test_a_second_signal_does_not_wait(config):
    with process("--config", config("drain_seconds = 500")) as (found, port):
        connection, answer, _ = begun(port, response_format=TEXT, n=8, temperature=1)
        found.send_signal(signal.SIGINT)
        time.sleep(0.3)
        found.send_signal(signal.SIGINT)
        assert found.wait(20) is not None
        answer.close()
        connection.close()


def test_sighup_reads_keys_and_models_again(config, model_files, tmp_path):
    path = config()
    with process("--config", path) as (found, port):
        config(others=f'[models.other]\npath = "{model_files[1]}"\n')
        found.send_signal(signal.SIGHUP)

        def names():
            return [item["id"] for item in json.loads(ask(port, "GET", "/v1/models")[1].read())["data"]]

        until(lambda: names() == ["toy", "other"])
        path.write_text("nonsense = 1\n")
        found.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert names() == ["toy", "other"]  # a file that cannot be used changes nothing
        _, line = keys.new_key("one")
        (tmp_path / "keys").write_text(line)
        config(others=f'[keys]\nfile = "{tmp_path / "keys"}"\n')
        found.send_signal(signal.SIGHUP)
        until(lambda: ask(port, "GET", "/v1/models")[1].status == 401)


# --- systemd


@pytest.fixture
def heard(tmp_path):
    """What a daemon has told systemd, a growing list."""
    found = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))

        def listen():
            while (state := listener.recv(100)) != b"end":
                found.append(state)

        thread = threading.Thread(target=listen)
        thread.start()
        yield found
        systemd.notify("end", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        thread.join()


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_systemd_is_told(config, heard, tmp_path):
    environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "400000"}
    with process("--config", config(), environment=environment) as (found, _):
        until(lambda: heard.count(b"READY=1") == 1)
        signs = heard.count(b"WATCHDOG=1")
        until(lambda: heard.count(b"WATCHDOG=1") > signs + 2)
        found.send_signal(signal.SIGHUP)
        until(lambda: heard.count(b"READY=1") == 2)
        found.send_signal(signal.SIGTERM)
        assert found.wait(20) == 0
    states = [state for state in heard if state != b"WATCHDOG=1"]
    assert states == [b"READY=1", b"RELOADING=1", b"READY=1", b"STOPPING=1"]


def test_a_listener_that_does_not_read_holds_nothing_up(tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        while systemd.notify("WATCHDOG=1", environment):
            pass
        started = time.monotonic()
        assert not systemd.notify("WATCHDOG=1", environment)
        assert time.monotonic() - started < 5


ACTIVATED = """
import os, sys
os.dup2(int(sys.argv.pop(1)), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
from edgekit.cli import main
main()
"""


def test_a_socket_of_systemd_is_used(config):
    with socket.create_server(("127.0.0.1", 0)) as held:
        port, number = held.getsockname()[1], held.fileno()
        command = [sys.executable, "-c", ACTIVATED, str(number), "serve", "--config", str(config())]
        with subprocess.Popen(command, pass_fds=[number], stderr=subprocess.PIPE, text=True) as found:
            try:
                assert any(f"at http://127.0.0.1:{port}" in line for line in found.stderr)
                assert ask(port, "GET", "/readyz")[1].status == 200
            finally:
                found.terminate()
                assert found.wait(20) == 0


def test_what_systemd_says_in_the_environment():
    assert systemd.watchdog_seconds({}) is None
    assert systemd.watchdog_seconds({"WATCHDOG_USEC": "30000000"}) == 30.0
    assert systemd.watchdog_seconds({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "5"}, process=5) == 30.0
    assert systemd.watchdog_seconds({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "5"}, process=6) is None
    assert systemd.watchdog_seconds({"WATCHDOG_USEC": "soon"}) is None
    assert systemd.sockets({"LISTEN_FDS": "1", "LISTEN_PID": "5"}, process=6) == []
    assert systemd.sockets({"LISTEN_FDS": "x", "LISTEN_PID": "5"}, process=5) == []
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": "/no/such/socket"})


# --- the command line


def test_a_new_key_is_printed_once(edgekit):
    done = edgekit("serve", "--new-key", "telescope")
    key = done.err.split()[-1]
    assert done.out.strip() == f"telescope:{keys.hashed(key)}"
    assert edgekit("serve", "--new-key", "a b").failed_with(1, "the name 'a b'")


def test_the_command_names_what_is_wrong(edgekit, tmp_path, model_files):
    assert edgekit("serve").failed_with(1, "no model to serve")
    (tmp_path / "serve.toml").write_text("[modles.a]\n")
    assert edgekit("serve", "--config", tmp_path / "serve.toml").failed_with(1, "did you mean 'models'")
    assert edgekit("serve", model_files[0], "--listen", "0.0.0.0:0").failed_with(
        1, "there are no API keys", "--new-key"
    )
    assert edgekit("serve", model_files[0], "--listen", "192.0.2.1:1").failed_with(1, "cannot listen on 192.0.2.1:1")
    assert edgekit("serve", model_files[0], "--memory", "lots").failed_with(1, "server.memory 'lots'")
    (tmp_path / "c.pem").write_text("x")
    (tmp_path / "serve.toml").write_text(
        f'[server]\ncertificate = "{tmp_path / "c.pem"}"\nprivate_key = "{tmp_path / "c.pem"}"\n'
    )
    assert edgekit("serve", model_files[0], "--config", tmp_path / "serve.toml").failed_with(1, "server.certificate")


def test_tls_is_served(config, tmp_path):
    authority = Authority(tmp_path / "authority")
    authority.sign(tmp_path / "node.pem")
    path = config(f'certificate = "{tmp_path / "node.pem"}"\nprivate_key = "{tmp_path / "node.pem"}"')
    with process("--config", path) as (_, port):
        trusted = ssl.create_default_context(cafile=authority.file)
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=trusted)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            http.client.HTTPSConnection("127.0.0.1", port, timeout=20).request("GET", "/readyz")


def test_a_model_that_must_be_there_at_the_start_and_is_not_ends_the_daemon(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(20))
    text = f'[server]\nlisten = "127.0.0.1:0"\n[models.bad]\npath = "{tmp_path / "bad.gguf"}"\nload = "at-start"\n'
    (tmp_path / "serve.toml").write_text(text)
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", "serve", "--config", "serve.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "bad.gguf" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


# --- deploy/


def unit(name):
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str
    parser.read(ROOT / "deploy" / name)
    return {section: dict(parser[section]) for section in parser.sections()}


def test_the_unit_fits_the_daemon(edgekit):
    from runtimes.daemon.app import STUCK_AFTER
    from runtimes.daemon.config import load
    from runtimes.daemon.run import END_SECONDS

    config = load(ROOT / "deploy" / "serve.toml")
    service = unit("edgekit-serve.service")["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > config.server.drain_seconds + END_SECONDS
    assert 0 < float(service["WatchdogSec"]) < STUCK_AFTER
    assert service["ExecReload"].endswith("-HUP $MAINPID")
    words = service["ExecStart"].split()
    assert words[1:3] == ["serve", "--config"]
    assert all(word in edgekit("serve", "--help").out for word in words if word.startswith("--"))
    wanted = {
        "DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes",
        "CapabilityBoundingSet": "", "PrivateUsers": "yes", "RestrictNamespaces": "yes", "KillSignal": "SIGTERM",
    }  # fmt: skip
    assert service | wanted == service
    assert unit("edgekit-serve.socket")["Socket"]["ListenStream"] == config.server.listen


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_accepts_the_units(tmp_path):
    text = (ROOT / "deploy" / "edgekit-serve.service").read_text()
    (tmp_path / "edgekit-serve.service").write_text(text.replace("/opt/edgekit/bin/edgekit", shutil.which("true")))
    shutil.copy(ROOT / "deploy" / "edgekit-serve.socket", tmp_path)
    paths = [str(path) for path in tmp_path.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
