import dataclasses

import pytest

from edgekit.errors import EdgekitError
from runtimes.daemon.config import LimitSettings, ModelSettings, ServerSettings, is_loopback, load


def write(tmp_path, text):
    (tmp_path / "serve.toml").write_text(text)
    return tmp_path / "serve.toml"


MODEL = '[models.a]\npath = "a.gguf"\n'


def test_a_file_is_read(tmp_path):
    config = load(write(tmp_path, MODEL + 'context = 512\n[limits]\nqueue = 3\n[server]\nlisten = "127.0.0.1:1"\n'))
    assert config.models["a"] == ModelSettings(path="a.gguf", context=512)
    assert config.limits == dataclasses.replace(LimitSettings(), queue=3)
    assert config.address() == ("127.0.0.1", 1)


def test_models_of_the_command_line_need_no_file():
    config = load(None, ["smollm2", "some/where/t2.edge"], server={"listen": "[::1]:0"}, model={"threads": 2})
    assert {name: model.path for name, model in config.models.items()} == {
        "smollm2": "smollm2",
        "t2": "some/where/t2.edge",
    }
    assert config.models["t2"].threads == 2
    assert config.address() == ("::1", 0)
    assert config.server == ServerSettings(listen="[::1]:0")


def test_the_category_is_known_by_the_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    paths = {"a.gguf": "language", "smollm2": "language", "t2-gr": "tensors", str(tmp_path): "language"}
    assert {path: ModelSettings(path=path).category for path in paths} == paths
    assert ModelSettings(path="a.gguf", task="tensors").category == "tensors"
    (tmp_path / "both.edge").mkdir()
    for name in ("config.json", "edgekit.json"):
        (tmp_path / "both.edge" / name).write_text("{}")
    assert ModelSettings(path=str(tmp_path / "both.edge")).category == "tensors"  # a bundle, whatever else it holds


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no model to serve"),
        ("[model.a]\n", "'models'"),
        (MODEL + "contxt = 1\n", "did you mean 'context'"),
        (MODEL + "[limits]\nque = 1\n", "did you mean 'queue'"),
        (MODEL + "context = -1\n", "models.a.context is -1"),
        (MODEL + "idle_seconds = nan\n", "models.a.idle_seconds is nan"),
        (MODEL + "batch_seconds = inf\n", "models.a.batch_seconds is inf"),
        (MODEL + "[limits]\nbody_seconds = nan\n", "limits.body_seconds is nan"),
        (MODEL + "[limits]\nqueue = 0\n", "limits.queue is 0"),
        (MODEL + '[limits]\nbody = "much"\n', "limits.body"),
        (MODEL + '[server]\nlisten = "here"\n', "HOST:PORT"),
        (MODEL + '[server]\nlisten = "127.0.0.1:99999"\n', "HOST:PORT"),
        (MODEL + '[server]\ncertificate = "a.pem"\n', "TLS needs both"),
        (MODEL + '[server]\ndrain_seconds = "long"\n', "expected a number"),
        ("[models.a]\n", "'path' is missing"),
        ('[models."a/b"]\npath = "x"\n', "the name 'a/b'"),
        (MODEL + 'task = "vision"\n', "expected one of: auto, language, tensors"),
        (MODEL + "[keys]\nrequests_per_minute = -1\n", "keys.requests_per_minute is -1"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, text, words):
    with pytest.raises(EdgekitError) as found:
        load(write(tmp_path, text))
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_a_name_that_two_models_have_is_refused(tmp_path):
    with pytest.raises(EdgekitError, match="two models have the name 'a'"):
        load(write(tmp_path, MODEL), ["else/a.gguf"])


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(EdgekitError, match=r"none.toml cannot be read: No such file"):
        load(tmp_path / "none.toml")


def test_which_hosts_only_this_machine_reaches():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.1.2", "example.org")] == [False] * 4


def test_every_value_has_a_text_for_the_documentation():
    for table in (ServerSettings, LimitSettings, ModelSettings):
        assert [item.name for item in dataclasses.fields(table) if not item.metadata.get("help")] == []
