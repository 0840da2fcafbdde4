"""Registries over HTTP (a server of the test's own), in a folder and in memory; what fails, and whose fault it is."""

import base64
import contextlib
import io
import json
import logging
import multiprocessing
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fastavro
import pytest

from alert_broker.containers import WIRE_HEADER, BadPacket, Block, split
from alert_broker.packets import batches
from alert_broker.simulate import simulate
from alert_broker.stream import registry
from alert_broker.stream.registry import FolderRegistry, RegistryError, open_registry
from alert_broker.surveys import lsst
from alert_broker.surveys.base import PacketError
from edgekit.errors import EdgekitError
from tests.alert_broker.test_containers import held

SCHEMA = json.dumps({"type": "record", "name": "one", "fields": [{"name": "x", "type": "int"}]})
OTHER = json.dumps({"type": "record", "name": "two", "fields": [{"name": "x", "type": "int"}]})


class Service:
    """What Confluent's registry answers, and what it was asked. failing: statuses given before that, one a request."""

    def __init__(self):
        self.schemas, self.asked, self.failing, self.headers = {}, [], [], []
        self.extra, self.password = {}, None
        service = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def answer(self, status, body):
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                if 300 <= status < 400:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                service.asked.append(self.path)
                service.headers.append(dict(self.headers))
                if service.failing:
                    return self.answer(service.failing.pop(0), b"no JSON")
                if service.password and self.headers.get("Authorization") != service.password:
                    return self.answer(401, {"error_code": 401, "message": "who?"})
                if self.path == "/schemas/types":
                    return self.answer(200, ["AVRO"])
                match = re.fullmatch(r"/schemas/ids/(\d+)", self.path)
                if not match:
                    return self.answer(404, b"<html>another server's page</html>")
                if int(match[1]) not in service.schemas:
                    return self.answer(404, {"error_code": 40403, "message": "Schema not found"})
                return self.answer(200, {"schema": service.schemas[int(match[1])]} | service.extra)

            def do_POST(self):
                service.asked.append(self.path)
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if service.failing:
                    return self.answer(service.failing.pop(0), b"")
                if self.path != "/subjects/a%2Fb-value/versions":
                    return self.answer(404, b"")
                known = [number for number, text in service.schemas.items() if text == body["schema"]]
                number = known[0] if known else 77
                service.schemas[number] = body["schema"]
                return self.answer(200, {"id": number})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    found = Service()
    yield found
    found.stop()


@pytest.fixture
def waits():
    return []


def opened(service, waits, **options):
    return open_registry(service.url + "/", sleep=waits.append, **options)


def test_schemas_are_asked_for_once(service, waits):
    service.schemas[5] = SCHEMA
    client = opened(service, waits)
    assert [client.schema(5), client.schema(5)] == [SCHEMA, SCHEMA]
    assert service.asked == ["/schemas/ids/5"]
    assert "Authorization" not in service.headers[0]


def test_a_schema_is_registered_once_under_a_quoted_subject(service, waits):
    client = opened(service, waits)
    assert [client.register("a/b-value", SCHEMA), client.register("a/b-value", SCHEMA)] == [77, 77]
    assert service.asked == ["/subjects/a%2Fb-value/versions"]
    assert client.schema(77) == SCHEMA


def test_an_unknown_id_is_the_packets_fault_and_remembered_for_a_while(service, waits, monkeypatch):
    client = opened(service, waits)
    for _ in range(3):
        with pytest.raises(PacketError, match=rf"unknown schema id 9: neither .* nor in {service.url}"):
            client.schema(9)
    assert service.asked == ["/schemas/ids/9"]
    monkeypatch.setattr(registry, "FORGET_UNKNOWN_SECONDS", 0.0)
    service.schemas[9] = SCHEMA  # registered since
    assert client.schema(9) == SCHEMA
    with pytest.raises(PacketError):
        client.schema(2**32 - 1)  # more than a registry has: not asked for
    assert waits == []


@pytest.mark.parametrize("answer", [{}, {"schemaType": "PROTOBUF"}], ids=["unknown id", "another format"])
def test_packets_of_an_id_without_a_schema_do_not_stay_in_memory(service, waits, answer):
    if answer:
        service.schemas[4711], service.extra = SCHEMA, answer
    assert held(opened(service, waits).schema) == [False] * 3
    assert service.asked == ["/schemas/ids/4711"]


def test_ids_that_are_unknown_do_not_fill_the_memory(service, waits, monkeypatch):
    monkeypatch.setattr(registry, "MOST_UNKNOWN", 3)
    client = opened(service, waits)
    for number in range(10):
        with pytest.raises(PacketError):
            client.schema(number)
        assert len(client._unknown) <= 3


def test_what_may_pass_is_tried_again(service, waits):
    service.schemas[5] = SCHEMA
    service.failing = [503, 429, 500]
    assert opened(service, waits).schema(5) == SCHEMA
    assert waits == list(registry.DELAYS)
    assert len(service.asked) == 4


@pytest.mark.parametrize("failing", [[500] * 4, [200] * 4, [302]])
def test_a_registry_that_does_not_answer_is_nobodys_dead_letter(service, waits, failing):
    """200 with what is no JSON, too: a proxy's page. A redirect is not followed, since it would take the password."""
    service.failing = list(failing)
    with pytest.raises(RegistryError, match=r"the schema registry http.*(does not answer|refuses)") as caught:
        opened(service, waits).schema(5)
    assert not isinstance(caught.value, PacketError)
    assert len(service.asked) == len(failing)


def test_a_registry_that_is_down(service, waits):
    service.stop()
    with pytest.raises(RegistryError, match=r"does not answer: .*refused.*\(tried 4 times\); nothing is lost"):
        opened(service, waits).schema(5)
    assert waits == list(registry.DELAYS)


def test_another_servers_404_is_not_an_unknown_id(service, waits):
    with pytest.raises(RegistryError, match=r"refuses: HTTP status 404 .*; check the URL"):
        open_registry(service.url + "/api", sleep=waits.append).schema(5)


@pytest.mark.parametrize(
    ("status", "advice"),
    [
        (401, "check user and password"),
        (409, "does not fit the subject's others"),
        (422, "takes the schema to be invalid"),
    ],
)
def test_a_refusal_says_what_to_do(service, waits, status, advice):
    service.failing = [status]
    with pytest.raises(RegistryError, match=f"refuses: HTTP status {status} .*; .*{advice}"):
        opened(service, waits).register("a/b-value", SCHEMA)
    assert waits == []


def test_the_password_is_sent_and_never_shown(service, waits, caplog):
    service.schemas[5], secret = SCHEMA, "s3cr:t/é"
    service.password = f"Basic {base64.b64encode(f'me:{secret}'.encode()).decode()}"
    inside = service.url.replace("//", "//me:s3cr%3At%2F%C3%A9@")
    with caplog.at_level(logging.DEBUG):
        for client in (opened(service, waits, user="me", password=secret), open_registry(inside, sleep=waits.append)):
            assert client.schema(5) == SCHEMA
            service.failing = [401]
            with pytest.raises(RegistryError) as refused:
                client.schema(6)
            service.failing = [500] * 4
            with pytest.raises(RegistryError) as failed:
                client.schema(7)
            for text in (repr(client), str(refused.value), str(failed.value), caplog.text):
                assert not any(part in text for part in (secret, "s3cr", service.password, service.password[6:]))
    for url in ("http://me:s3cr@:80/", "ftp://me:s3cr@host", "http://me:s3cr@host:port/"):
        with pytest.raises(EdgekitError) as wrong:
            open_registry(url)
        assert "s3cr" not in str(wrong.value)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"schemaType": "PROTOBUF"}, "is 'PROTOBUF'; expected AVRO"),
        ({"references": [{"name": "x"}]}, "refers to other schemas"),
    ],
)
def test_schemas_that_cannot_be_used(service, waits, extra, reason):
    service.schemas[5], service.extra = SCHEMA, extra
    with pytest.raises(PacketError, match=reason):
        opened(service, waits).schema(5)


# --- a folder, and memory


@pytest.mark.parametrize("kind", ["file", "mock"])
def test_numbers_are_the_schemas_own(tmp_path, kind):
    url = f"file:{tmp_path}/schemas" if kind == "file" else f"mock://{tmp_path}"
    first = open_registry(url)
    number = first.register("a", SCHEMA)
    assert first.register("b", json.dumps(json.loads(SCHEMA), indent=2)) == number  # white space is no difference
    other = open_registry(url).register("a", OTHER)
    assert other != number
    assert json.loads(open_registry(url).schema(other)) == json.loads(OTHER)
    with pytest.raises(PacketError, match="unknown schema id 99"):
        open_registry(url).schema(99)
    with pytest.raises(PacketError):
        open_registry(f"{url}x").schema(number) if kind == "mock" else first.schema(-1)


def test_a_folder_takes_schemas_put_there_by_hand(tmp_path):
    (tmp_path / "1200.avsc").write_text(SCHEMA)
    client = open_registry(f"file://{tmp_path}")
    assert client.schema(1200) == SCHEMA
    assert client.register("a", SCHEMA) == 1200
    assert client.register("a", OTHER) == 1201


def test_a_folder_that_is_not_there_is_no_packets_fault(tmp_path):
    with pytest.raises(RegistryError, match="does not exist"):
        FolderRegistry(tmp_path / "gone").schema(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be written"):
        FolderRegistry(tmp_path / "file").register("a", SCHEMA)


def _register(folder, name):
    text = json.dumps({"type": "record", "name": name, "fields": [{"name": "x", "type": "int"}]})
    return name, FolderRegistry(folder).register("a", text)


def test_processes_that_register_at_once_do_not_share_a_number(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_register, [(tmp_path, f"n{k % 10}") for k in range(40)])
    assert len(set(found)) == len({number for _, number in found}) == 10
    for name, number in found:
        assert json.loads(FolderRegistry(tmp_path).schema(number))["name"] == name


def test_registries_of_no_known_kind():
    with pytest.raises(EdgekitError, match="is not supported; expected http://HOST:PORT"):
        open_registry("ftp://host")


# --- packets with a schema that is not installed


def newer_message():
    """An LSST packet of a schema 12.0 that no installed package has: the newest one's, renamed."""
    newest = max(lsst.schema_versions())
    major, minor = divmod(newest, 100)
    text = json.dumps({key: value for key, value in lsst.schema(newest).items() if key != "__fastavro_parsed__"})
    schema = json.loads(text.replace(f"v{major}_{minor}", "v12_0"))
    schema.pop("__named_schemas", None)
    alert = next(iter(simulate("lsst", 1, 3, cutouts=False)))
    body = io.BytesIO()
    fastavro.schemaless_writer(body, schema, alert.packet)
    return WIRE_HEADER.pack(0, 1200) + body.getvalue(), json.dumps(schema), alert


def test_a_newer_lsst_schema_comes_from_the_registry(service, waits):
    message, text, alert = newer_message()
    (bad,) = split(message, "bytes")
    assert isinstance(bad, BadPacket)
    assert "unknown LSST schema id 1200" in bad.reason
    client = opened(service, waits)
    (bad,) = split(message, "bytes", client.schema)
    assert isinstance(bad, BadPacket)
    assert "unknown schema id 1200: neither one of LSST's that is installed nor in" in bad.reason
    service.schemas[1200] = text
    client = opened(service, waits)
    (block,) = split(message, "bytes", client.schema)
    assert isinstance(block, Block)
    assert (block.schema.name, block.schema.survey.name) == ("lsst.v12_0.alert", "lsst")
    (batch,) = batches([block])
    assert batch.alerts["alert_id"].to_pylist() == [alert.curve.alert_id]
    assert batch.curves.flux == pytest.approx(alert.curve.flux)


def test_a_registry_that_is_down_costs_no_packet(service, waits):
    """The error comes through, for the consumer to try again. So it does for an id that is one of LSST's, since the
    registry may have another schema under it."""
    message, text, _ = newer_message()
    service.schemas[1200] = text
    service.failing = [500] * 4
    client = opened(service, waits)
    with pytest.raises(RegistryError):
        list(split(message, "bytes", client.schema))
    assert isinstance(next(split(message, "bytes", client.schema)), Block)  # it is back
    known = WIRE_HEADER.pack(0, max(lsst.schema_versions())) + message[5:]
    assert isinstance(next(split(known, "bytes", opened(service, waits).schema)), Block)
    service.stop()
    with pytest.raises(RegistryError):
        next(split(known, "bytes", opened(service, waits).schema))


def test_a_registrys_schema_that_is_no_schema_is_a_bad_packet(service, waits):
    service.schemas[1200] = '{"type": "recard"}'
    (bad,) = split(WIRE_HEADER.pack(0, 1200) + b"datum", "bytes", opened(service, waits).schema)
    assert "the schema does not parse" in bad.reason


class Drip:
    """A server that sends its answer a byte at a time. pieces: what it sends before each wait."""

    def __init__(self, pieces):
        self.pieces, self.ended = pieces, threading.Event()
        self.sent = 0  # a tenth of a second lies between two pieces
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.answer, args=[connection], daemon=True).start()

    def answer(self, connection):
        with contextlib.suppress(OSError), connection:
            for piece in self.pieces:
                connection.sendall(piece)
                self.sent += 1
                if self.ended.wait(0.1):
                    return

    def stop(self):
        self.ended.set()
        self.listener.close()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"


@pytest.mark.parametrize("pieces", [[HEAD, *[b" "] * 600], [b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n"] * 600]])
def test_an_answer_that_drips_has_a_deadline(waits, monkeypatch, pieces):
    """Each byte comes long before a time limit for one byte."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(registry, "DELAYS", (0.0,))
    drip = Drip(pieces)
    client = open_registry(drip.url, sleep=waits.append, seconds=0.5)
    with pytest.raises(
        RegistryError, match=r"does not answer: (no complete answer within 0.5 s|\d+ bytes of an answer)"
    ):
        client.schema(5)
    assert drip.sent < 50
    drip.stop()


@pytest.mark.parametrize(
    ("status_line", "shown"),
    [
        (b"HTTP\x1b[2J\r\n", r"HTTP\\x1b\[2J"),
        (b"two\x0blines\r\n", "two lines"),
        (b"x" * 9000 + b"\r\n", r"x{200} \(tried"),
    ],
)
def test_a_status_line_of_a_stranger_stays_in_one_short_line(waits, monkeypatch, status_line, shown):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(registry, "DELAYS", ())
    drip = Drip([status_line])
    with pytest.raises(RegistryError, match=shown) as refused:
        open_registry(drip.url, sleep=waits.append).schema(5)
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).isprintable()
    drip.stop()


def test_who_stops_does_not_wait_for_an_answer_that_drips(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    drip, began = Drip([HEAD, *[b" "] * 600]), time.monotonic()
    client = open_registry(drip.url, stopped=lambda: time.monotonic() > began + 0.2)
    with pytest.raises(RegistryError, match="the consumer stops"):
        client.schema(5)
    assert drip.sent < 20
    drip.stop()


@pytest.mark.parametrize("answer", [{"schema": 5}, {}, {"schema": None}])
def test_an_answer_without_a_text_is_the_ids_fault(service, waits, answer):
    service.schemas[5], service.extra = SCHEMA, {"schema": None} | answer
    with pytest.raises(PacketError, match="has no text for schema 5"):
        opened(service, waits).schema(5)


def test_a_registry_that_fails_on_one_id_only_is_not_waited_for(service, waits):
    """It answers another question: the second time, the schema is at fault. A registry that is down is waited for."""
    service.schemas[5] = SCHEMA
    client = opened(service, waits)
    for blamed in (False, True):
        service.failing = [500] * 4
        with pytest.raises(RegistryError) as failed:
            client.schema(7)
        assert client.blames(failed.value) is blamed
    with pytest.raises(PacketError, match=r"schema 7 cannot be had: .*HTTP status 500"):
        client.schema(7)
    assert client.schema(5) == SCHEMA
    for _ in range(5):
        service.failing = [500] * 4
        with pytest.raises(RegistryError) as failed:
            client.schema(8)
        service.failing = [503]
        assert not client.blames(failed.value)
