"""broker.toml: misspelt names are errors, flags replace values of the file, and secrets are shown nowhere."""

import tomllib
from dataclasses import fields

import pytest

from alert_broker.stream import config as configuration
from edgekit.errors import EdgekitError

GOOD = """
[source]
topics = ["ztf"]
start_at = "latest"
[batch]
seconds = 1
[[output]]
topic = "kilonovae"
where = "best_class == 'KN'"
format = "json"
[[output]]
topic = "everything"
[kafka]
"bootstrap.servers" = "localhost:9092"
"sasl.password" = "hunter2"
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "broker.toml"
    path.write_text(GOOD)
    return path


def test_a_file_and_flags(path):
    config = configuration.load(path, {"source": {"group": "night"}, "batch": {"size": 7}, "kafka": {"client.id": "x"}})
    assert (config.source.topics, config.source.group, config.source.start_at) == (("ztf",), "night", "latest")
    assert (config.batch.size, config.batch.seconds) == (7, 1.0)
    assert [item.topic for item in config.output] == ["kilonovae", "everything"]
    assert config.kafka_settings()["client.id"] == "x"
    assert configuration.load(path, {"output": [{"topic": "other"}]}).output == (configuration.Output("other"),)


@pytest.mark.parametrize(("line", "said"), [
    ("[sauce]\nx = 1", "did you mean 'source'"),
    ("[source]\ntopic = ['a']", "did you mean 'topics'"),
    ("[source]\ntopics = 'ztf'", "topics = 'ztf'; expected an array"),
    ("[batch]\nsize = '512'", "expected a whole number"),
    ("[batch]\nsize = true", "expected a whole number"),
    ("[publish]\nmode = 'at-most-once'", "expected one of: at-least-once, exactly-once"),
    ("[output]\ntopic = 'x'", r"\[\[output\]\]"),
    ("kafka = 'localhost'", r"expected a table \[kafka\]"),
    ("[kafka]\n'enable.auto.commit' = true", "decides whether alerts are lost"),
    ("[kafka]\n'acks' = 0", "decides whether alerts are lost"),
])  # fmt: skip
def test_what_is_wrong_is_said(line, said):
    with pytest.raises(EdgekitError, match=said):
        configuration.parse(tomllib.loads(line), "broker.toml")


@pytest.mark.parametrize(("changes", "said"), [
    ({"source": {"topics": ()}}, "no topic to read"),
    ({"output": []}, "results go nowhere"),
    ({"output": [{"topic": "ztf"}]}, "both read and written"),
    ({"output": [{"topic": "a"}, {"topic": "a"}]}, "share a topic"),
    ({"dead_letters": {"topic": "everything"}}, "share a topic"),
    ({"metrics": {"listen": "localhost"}}, "expected HOST:PORT"),
    ({"batch": {"size": 0}}, "expected 1 or more"),
    ({"dead_letters": {"max_ratio": 1.5}}, "expected 0 to 1"),
])  # fmt: skip
def test_what_cannot_work_is_said(path, changes, said):
    with pytest.raises(EdgekitError, match=said):
        configuration.load(path, changes)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"x = " + 3000 * b"[", "not valid TOML: .*recursion"),
        (b"x = \xff", "not valid TOML: .*utf-8"),
        (b"x = " + 6000 * b"a.", "edgekit reads no larger TOML files"),
        (b"#" * (1 << 20) + b"#", "edgekit reads no larger TOML files"),
    ],
)
def test_a_file_that_is_damaged_or_takes_too_much_is_refused_in_one_line(path, content, said):
    path.write_bytes(content)
    with pytest.raises(EdgekitError, match=said) as refused:
        configuration.load(path)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"hunter2"', '"env:a\\nb"', r"variable 'a\\nb', which is not set"),
        ('"sasl.password" = "hunter2"', '"a\\nb" = ["hunter2"]', r"kafka has a list for 'a\\nb'"),
        (
            '"everything"',
            '"a\\nb"\n[dead_letters]\ntopic = "a\\nb"',
            r"two outputs share a topic: 'kilonovae', 'a\\nb'",
        ),
    ],
)
def test_a_line_end_in_a_name_does_not_end_the_line_of_the_error(path, old, new, said):
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(EdgekitError, match=said) as refused:
        configuration.load(path).kafka_settings()
    assert len(str(refused.value).splitlines()) == 1


def test_secrets_are_shown_nowhere(path, monkeypatch):
    config = configuration.load(path)
    assert "hunter2" not in repr(config)
    with pytest.raises(EdgekitError) as wrong:
        configuration.parse({"kafka": {"sasl.password": ["hunter2"]}}, "broker.toml")
    assert "hunter2" not in str(wrong.value)
    config = configuration.load(path, {"kafka": {"sasl.password": "env:EDGEKIT_TEST_PASSWORD"}})
    with pytest.raises(EdgekitError, match="'EDGEKIT_TEST_PASSWORD', which is not set"):
        config.kafka_settings()
    monkeypatch.setenv("EDGEKIT_TEST_PASSWORD", "swordfish")
    assert config.kafka_settings()["sasl.password"] == "swordfish"
    assert "swordfish" not in repr(config)
    config = configuration.load(path, {"registry": {"url": "https://me:hunter2@registry"}})
    assert "hunter2" not in repr(config)
    assert config.registry_url() == "https://me:hunter2@registry"


def test_every_value_has_a_flag_and_its_help():
    import typing

    from alert_broker.commands.consume import flags

    options = {option.opts[0] for option in flags()}
    for table, kind in typing.get_type_hints(configuration.Config).items():
        if table in ("output", "kafka"):
            continue
        for item in fields(kind):
            assert item.metadata["help"]
            assert f"--{table}-{item.name}".replace("_", "-") in options
