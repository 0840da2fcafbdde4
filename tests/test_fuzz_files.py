"""The readers of what strangers send survive some hundred damaged files each, the same ones in every run, and the
files that once made a reader fail. Planted readers that misbehave show that the engine notices each misbehaviour."""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tests.conftest import ROOT

TOOLS = ROOT / "tools"
FINDS = sorted((ROOT / "tests" / "fuzz_finds").iterdir())  # inputs that made a reader fail, by its name
# files for each reader: some seconds of work, and for some of them much of it is starting
FILES = {
    "npz": 400,
    "safetensors": 300,
    "bundle": 50,
    "pack": 50,
    "recipe": 80,
    "target": 60,
    "image": 300,
    "onnx": 20,
    "hugging-face": 6,
    "language-folder": 25,
    "pt2": 12,
    "message": 3,
    "registry": 60,
    "broker": 150,
    "cutout": 400,
    "gguf": 20,
}
NEEDED = {"onnx": "onnxruntime", "hugging-face": "transformers", "pt2": "torch", "image": "PIL", "recipe": "torch"}
NEEDED |= dict.fromkeys(("gguf", "language-folder"), "tokenizers")
NEEDED |= dict.fromkeys(("bundle", "pack"), "onnx") | dict.fromkeys(
    ("message", "registry", "broker"), "confluent_kafka"
)


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        yield importlib.import_module("fuzz_files")


@pytest.fixture(scope="module")
def worker(tool):
    return importlib.import_module("fuzz_worker")


def skip_without(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])


@pytest.fixture(scope="module")
def changes(tool):
    return importlib.import_module("fuzz_changes")


def test_no_stored_input_names_the_machine_that_made_it():
    """torch writes the paths of its modules into a .pt2 file."""
    assert [path.name for path in FINDS if b".venv/" in path.read_bytes() or b"/home/" in path.read_bytes()] == []


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused_in_one_line(name, tool):
    """Those that once made the reader fail come first."""
    skip_without(name)
    finds = [path for path in FINDS if path.name.rpartition("-")[0] == name]
    tally = tool.fuzz(name, files=FILES[name], replay=finds)
    assert tally.failures == []
    assert tally.files == len(finds) + FILES[name] == tally.accepted + tally.refused + tally.stopped
    if name == "message":  # a batch of messages has no exit status: each message in it has one outcome
        assert tally.accepted == tally.files
    else:
        assert tally.refused > tally.files / 2, tally
        assert tally.accepted > 0, tally
    assert tally.stopped <= 2, tally


@pytest.mark.parametrize(("name", "lines"), [("npz", 3), ("pack", 2)])
def test_stored_inputs_make_a_reader_fail_that_prints_warnings(name, lines, tool, monkeypatch):
    """Planted: the command line hides no warnings of libraries if Python is asked for them."""
    skip_without(name)
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    (path,) = [path for path in FINDS if path.name.startswith(f"{name}-")]
    (failure,) = tool.fuzz(name, replay=[path]).failures
    assert f"with {lines} lines of error" in failure


def test_every_reader_is_run_and_those_in_python_are_guided(tool, worker):
    for package in ("torch", "onnx", "confluent_kafka"):
        pytest.importorskip(package)
    assert list(importlib.import_module("fuzz_readers").READERS) == list(FILES)
    assert set(FILES) - set(worker.GUIDED) == {"safetensors", "onnx", "message"}
    assert {path.name.rpartition("-")[0] for path in FINDS} <= set(FILES)


PLANTED = {
    "an exception": ("raise ValueError('odd')", "ValueError: odd"),
    "two lines": ("raise EdgekitError('a\\nb')", "not one line"),
    "two lines of error": (
        "print('a', file=sys.stderr)\nraise EdgekitError('b')",
        "exit status 1 with 2 lines of error",
    ),
    "another exit status": ("raise SystemExit(3)", "exit status 3"),
    "no line of error": ("raise SystemExit(1)", "exit status 1 with 0 lines of error"),
    "a control character": ("print('\\x1b[2J')", r"it prints the control character '\x1b'"),
    "a file left behind": ("tempfile.mkstemp('.left')", ".left in the temporary folder"),
    "a program": ("subprocess.run(['true'])", "it tried this: subprocess.Popen"),
    "a hidden program": ("hidden(lambda: os.system('true'))", "it tried this: os.system"),
    "a connection": ("hidden(lambda: socket.create_connection(('127.0.0.1', 9)))", "it tried this: socket"),
    "a file": ("hidden(lambda: open('/root/.ssh/id_rsa'))", "it opened /root/.ssh/id_rsa"),
    "a written file": ("open('/usr/evil', 'w')", "it changed /usr/evil"),
    "a removed file": ("hidden(lambda: os.remove('/usr/evil'))", "it changed /usr/evil"),
    "memory": ("return bytearray(6 << 30)", "it takes too much memory"),
    "memory beyond the limit": ("return b'x' * (600 << 20)", " MiB for "),
    "output of native code": ("os.write(2, b'odd')", "native code prints 'odd'"),
    "a crash": ("ctypes.string_at(0)", "it ended with -11"),
    "time": ("while True: pass", "it takes too long"),
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(body): the module of a reader with this body; it misbehaves for the third file."""

    def plant(body, *, at="len(calls) == 5"):
        (tmp_path / "planted_readers.py").write_text(
            "import ctypes, os, socket, subprocess, sys, tempfile\nfrom edgekit.errors import EdgekitError\n"
            "from fuzz_readers import Reader, one_file\ncalls = []\n"
            "from edgekit.importers import sandbox\ndef crash(*ignored):\n    ctypes.string_at(0)\n"
            "def nothing(*ignored):\n    return b''\n"
            "def hidden(deed):\n    try:\n        deed()\n    except Exception:\n        pass\n"
            f"def read(path):\n    calls.append(1)\n    content = path.read_bytes()\n    if {at}:\n"
            f"{textwrap.indent(body, 20 * ' ')}\n"
            "READERS = {'planted': Reader(lambda: [{'x': b'abcdefgh'}], one_file('x'), read)}\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "planted_readers"

    return plant


@pytest.mark.parametrize(("body", "words"), PLANTED.values(), ids=PLANTED)
def test_a_planted_misbehaviour_is_noticed(body, words, planted, tool):
    tally = tool.fuzz("planted", files=4, file_seconds=2, module=planted(body))
    assert tally.files == 4
    assert len(tally.failures) == 1, tally
    assert words in tally.failures[0]
    assert tally.failures[0].startswith("planted 2: ")


def test_a_crash_in_the_sandbox_is_counted_as_stopped(planted, tool):
    tally = tool.fuzz("planted", files=4, module=planted("sandbox.run('planted_readers:crash', b'', 'x')"))
    assert (tally.files, tally.stopped, tally.failures) == (4, 1, [])


def test_a_crash_after_work_in_the_sandbox_is_a_failure(planted, tool):
    tally = tool.fuzz("planted", files=4, module=planted("sandbox.run('planted_readers:nothing', b'', 'x')\ncrash()"))
    assert (tally.files, tally.stopped, len(tally.failures)) == (4, 0, 1), tally
    assert "it ended with -11" in tally.failures[0]


def test_a_reader_that_behaves_is_not_blamed(planted, tool):
    tally = tool.fuzz("planted", files=4, module=planted("raise EdgekitError('one line')"))
    assert (tally.accepted, tally.refused, tally.failures) == (3, 1, [])


def test_a_reader_that_refuses_its_valid_file_is_no_harness(planted, tool):
    with pytest.raises(RuntimeError, match=r"cannot be started.*a valid file is not read"):
        tool.fuzz("planted", files=4, module=planted("raise EdgekitError('any')", at="True"))


def test_the_input_of_a_failure_is_stored_and_fails_again(planted, tool, changes, tmp_path):
    module = planted("raise ValueError('odd')", at="b'cde' not in content")
    (data,) = tool.fuzz("planted", files=40, module=module).finds.values()
    assert b"cde" not in changes.decode(data)["x"]
    (tmp_path / "find").write_bytes(data)
    assert tool.fuzz("planted", replay=[tmp_path / "find"], module=module).failures == ["planted 0: ValueError: odd"]


NESTED = "len(content) > 7" + "".join(
    f":\n{(5 + at) * ' '}if content[{at}] {'<' if at % 2 else '>='} {16 if at % 2 else 224}" for at in range(6)
)  # one after the other, so that each is a branch of its own


def test_branches_guide_to_a_failure_that_chance_does_not_find(planted, tool, changes, tmp_path):
    pytest.importorskip("atheris")
    module = planted("raise ValueError('deep')", at=NESTED)
    assert tool.fuzz("planted", files=4000, module=module).failures == []
    tally = tool.fuzz("planted", files=8000, module=module, guided=True, corpus=tmp_path / "corpus")
    assert "planted" in tally.failures[0]
    assert "ValueError: deep" in tally.failures[0]
    assert tally.branches > 0
    assert changes.decode(next(iter(tally.finds.values())))["x"][0] > 223
    assert len(list((tmp_path / "corpus").iterdir())) > 3


def test_the_same_seed_gives_the_same_files(changes):
    files = {"a": b"some content = 5\n" * 9, "b": b'{"x": [1, 2]}'}
    made = [changes.changed(files, random.Random(f"0 {number}")) for number in range(300)]
    assert made == [changes.changed(files, random.Random(f"0 {number}")) for number in range(300)]
    assert sum(item != files for item in made) > 250
    assert any(key.encode() in item["b"] for key in changes.KEYS for item in made)
    assert [changes.decode(changes.encode(item)) for item in made] == made
    assert [changes.decode(data) for data in (b"", b"x", changes.encode(files)[:-1])] == [None] * 3


def test_ctrl_c_reports_what_was_done_and_resume_goes_on(tmp_path):
    command = [sys.executable, TOOLS / "fuzz_files.py", "npz", "safetensors", "--random", "--folder", tmp_path]
    report = tmp_path / "report.json"
    command += ["--json", report, "--seconds", "0.6"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **options) as process:
        while not report.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        printed, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("fuzz_files: stopped; ")
    words = [line.split()[0] for line in printed.splitlines()]
    assert words == ["npz:", "safetensors:", "reader", "npz", "safetensors"]
    assert list(json.loads(report.read_text())["readers"]) == ["npz"]
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert [line.split()[0] for line in again.stdout.splitlines()] == ["safetensors:", "reader", "safetensors"]
    done = json.loads(report.read_text())["readers"]
    assert {name: item["failures"] for name, item in done.items()} == {"npz": 0, "safetensors": 0}
    assert all(item["files"] > 0 and item["seconds"] >= 0.6 for item in done.values())
