"""No line contains a secret, and machines and people can read every line."""

import io
import json
import logging
import re
import sys
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from alert_broker.stream import logs
from alert_broker.stream.logs import MASK, configure, redacted, secrets

# These are the names that librdkafka, Confluent's registry client, boto and plain HTTP use.
SECRET_KEYS = (
    "sasl.password", "ssl.key.password", "ssl.keystore.password", "ssl.key.pem", "sasl.oauthbearer.client.secret",
    "sasl.oauthbearer.config", "basic.auth.user.info", "SASL_PASSWORD", "ssl_key_password", "aws_secret_access_key",
    "aws_session_token", "Authorization", "api-key", "sasl.jaas.config",
)  # fmt: skip
PUBLIC_KEYS = (
    "bootstrap.servers", "group.id", "sasl.username", "sasl.mechanism", "security.protocol", "ssl.ca.location",
    "ssl.key.location", "ssl.certificate.pem", "sasl.oauthbearer.token.endpoint.url", "session.timeout.ms",
)  # fmt: skip
# Characters that no key and no public value here contains, and characters that quoting changes.
passwords = st.text("QZX0987µ'\"\\\n\t @:/?#%&+", min_size=logs.MIN_MASKED, max_size=20).filter(str.strip)
public = st.one_of(st.text("abcdefg.", max_size=12), st.integers(), st.floats(), st.booleans(), st.none())


def texts(value) -> list[str]:
    """Yield every text in a nested value except keys."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [str(value)]


def check_hidden(redact, config, hidden) -> None:
    for text in texts(redact(config)):
        assert not [secret for secret in hidden if secret in text and secret not in MASK], text


@given(
    st.dictionaries(st.sampled_from(SECRET_KEYS), passwords | passwords.map(str.encode), min_size=1),
    st.dictionaries(st.sampled_from(PUBLIC_KEYS), public),
)
def test_no_secret_comes_out(hidden, shown):
    plain = [value if isinstance(value, str) else value.decode() for value in hidden.values()]
    quoting = {"error_text": f"refused with {plain[0]!r}", "nested": {"deep": [dict(hidden), plain[-1]]}}
    config = {**shown, **hidden, **quoting, "url": "https://me:" + quote(plain[0], safe="") + "@registry:8081/x"}
    check_hidden(redacted, config, plain)
    found = redacted(config)
    assert list(found) == list(config)
    assert {key: repr(found[key]) for key in shown if type(shown[key]) is not float} == {
        key: repr(value) for key, value in shown.items() if type(value) is not float
    }
    assert all(found[key] == MASK for key in hidden)
    assert found["url"] == f"https://{MASK}@registry:8081/x"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "careless",
    [
        lambda config: config,
        lambda config: config | {"sasl.password": MASK},
        lambda config: {key: MASK if "password" in key else value for key, value in config.items()},
    ],
    ids=["nothing", "one key", "only passwords"],
)
def test_a_careless_redaction_is_caught(careless):
    config = {"sasl.password": "QQQQ", "sasl.oauthbearer.client.secret": "ZZZZ", "other": "in a message: QQQQ"}
    with pytest.raises(AssertionError):
        check_hidden(careless, config, ["QQQQ", "ZZZZ"])


@pytest.mark.parametrize("value", ["a", "", 7, 12345, None, True, ["p"], {"k": "v"}, b"\xff\x00"])
def test_a_secret_key_hides_whatever_it_holds(value):
    assert redacted(dict.fromkeys(SECRET_KEYS, value)) == dict.fromkeys(SECRET_KEYS, MASK)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://u:p@h:1/a", "http://***@h:1/a"),
        ("https://u:p@ss@h", "https://***@h"),
        ("http://token@h/a@b", "http://***@h/a@b"),
        ("a http://u:p@h, b https://h/x?mail=a@b.c", "a http://***@h, b https://h/x?mail=a@b.c"),
        ("127.0.0.1:9092,h:9093", "127.0.0.1:9092,h:9093"),
        ("http://h/a:b@c", "http://h/a:b@c"),
    ],
)
def test_urls(url, shown):
    assert redacted({"schema.registry.url": url}) == {"schema.registry.url": shown}


def test_the_password_of_a_url_is_known_elsewhere():
    found = redacted({"url": "http://me:hunter22@h/", "note": "hunter22 was refused", "user": "me"})
    assert found == {"url": f"http://{MASK}@h/", "note": f"{MASK} was refused", "user": "me"}
    assert "wonder99" in secrets({"basic.auth.user.info": "me:wonder99"})


# --- lines


@pytest.fixture
def log():
    """Return a function log(as_json, config), which returns a logger and the text that it has written."""

    def make(as_json=False, config=None):
        stream = io.StringIO()
        return configure(as_json=as_json, config=config, stream=stream), stream.getvalue

    yield make
    logger = logging.getLogger(logs.LOGGER)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def test_lines_for_people(log):
    logger, written = log()
    logger.debug("unseen")
    logger.info("partition %d is ours", 3, extra={"topic": "ztf", "lag": 12})
    logger.getChild("kafka").warning("slow")
    first, second = written().splitlines()
    assert first[10] == "T"
    assert first[23:] == "Z info    partition 3 is ours (topic ztf, lag 12)"
    assert second[23:] == "Z warning slow"


def test_lines_for_machines(log):
    logger, written = log(as_json=True)
    extra = {"topic": "ztf", "at": ("ztf", 3), "ratio": float("nan"), "level": "deep", "counts": {1: 2}, "raw": b"\xff"}
    logger.warning("two\nlines", extra=extra)
    try:
        _ = 1 / 0
    except ZeroDivisionError:
        logger.exception("failed")
    first, second = map(json.loads, written().splitlines())
    assert first.pop("time").endswith("Z")
    assert first == {
        "level": "warning",
        "logger": "edgekit",
        "message": "two\nlines",
        "topic": "ztf",
        "at": ["ztf", 3],
        "ratio": "nan",
        "level_": "deep",
        "counts": {"1": 2},
        "raw": "\\xff",
    }
    assert second["level"] == "error"
    assert second["exception"].startswith("Traceback")
    assert second["exception"].endswith("ZeroDivisionError: division by zero")


@given(passwords, st.booleans())
@example("0   ", False)
@example("a\"b'c", True)
@example("a\"b'c", False)
def test_no_secret_is_logged(password, as_json):
    stream = io.StringIO()
    logger = configure(as_json=as_json, config={"sasl.password": password}, stream=stream)
    try:
        logger.error("refused: %s", password, extra={"reason": f"with {password!r}", "sasl.password": password})
        logger.error(
            "in %s", json.dumps({"x": password}), extra={"config": {"a": [password]}, "also": Quoting(password)}
        )
        raise RuntimeError(password)
    except RuntimeError:
        logger.exception("failed")
    lines = without_times(stream.getvalue(), as_json)
    for form in (password, repr(password)[1:-1], json.dumps(password)[1:-1]):
        assert form not in lines or form in ": with in ()", (password, lines)


TIME = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z ", re.MULTILINE)


def without_times(lines, as_json):
    """What was logged without the times, which may hold a password such as 09:07 by chance."""
    if not as_json:
        return TIME.sub("", lines)
    parsed = [json.loads(line) for line in lines.splitlines()]
    return "\n".join(text for line in parsed for text in texts({k: v for k, v in line.items() if k != "time"}))


@pytest.mark.parametrize("as_json", [False, True])
def test_a_password_that_is_the_time_is_no_false_alarm(monkeypatch, as_json):
    real = logging.LogRecord

    class At(real):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.created = 1796029627.0  # 09:07:07

    monkeypatch.setattr(logging, "_logRecordFactory", At)
    test_no_secret_is_logged.hypothesis.inner_test("9:07", as_json)
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "without_times", lambda lines, as_json: lines)
        with pytest.raises(AssertionError):  # the test looks at such lines
            test_no_secret_is_logged.hypothesis.inner_test("9:07", as_json)


class Quoting:
    """An object whose text contains the password."""

    def __init__(self, password):
        self.password = password

    def __str__(self):
        return f"client({self.password})"


def test_arguments_that_do_not_fit_are_masked_too(log):
    logger, _ = log(config={"sasl.password": "hunter22"})
    record = logging.makeLogRecord({"msg": "too few %s %s", "args": ("hunter22",)})
    (handler,) = [item for item in logger.handlers if isinstance(item, logs._Lines)]
    assert handler.format(record).endswith(f"too few %s %s ('{MASK}',)")


def test_a_formatter_that_forgets_would_be_caught(monkeypatch):
    monkeypatch.setattr(logs, "_without", lambda text, known: text)
    with pytest.raises(AssertionError):
        test_no_secret_is_logged()


def test_text_from_packets_cannot_forge_lines_or_paint(log):
    logger, written = log()
    logger.info("bad \x1b[31m\n2026-01-01 info all is well", extra={"reason": "a\r\nb\x9b"})
    (line,) = written().splitlines()
    assert line.endswith(r"info    bad \x1b[31m\n2026-01-01 info all is well (reason a\r\nb\x9b)")


def test_standard_error_is_looked_up_each_time(log, monkeypatch, capsys):
    log()
    logger = configure()
    monkeypatch.setattr(sys, "stderr", replaced := io.StringIO())
    logger.info("here")
    assert replaced.getvalue().endswith("here\n")
    assert len([handler for handler in logger.handlers if isinstance(handler, logs._Lines)]) == 1
