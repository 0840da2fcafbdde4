"""The readers of strangers' files survive some hundred damaged files each, the same ones in every run; planted readers
that misbehave show that the engine notices each kind of misbehaviour."""

import sys
import textwrap
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
# files for each reader: some seconds of work, and for two of them much of it is starting
FILES = {
    "npz": 600,
    "npz-archive": 600,
    "safetensors": 600,
    "bundle": 150,
    "pack": 400,
    "recipe": 300,
    "target": 300,
    "image": 300,
    "onnx": 120,
    "hugging-face": 60,
    "pt2": 12,
}
NEEDED = {"onnx": "onnxruntime", "hugging-face": "transformers", "pt2": "torch", "image": "PIL", "recipe": "torch"}


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        import fuzz_files

        yield fuzz_files
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("fuzz_files", None)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_are_read_or_refused_in_one_line(name, tool):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    tally = tool.fuzz(name, files=FILES[name])
    assert tally.failures == []
    assert tally.files == FILES[name]
    assert tally.refused > tally.files / 2, tally
    assert tally.stopped <= 2, tally


def test_every_reader_is_run():
    import ast

    tree = ast.parse((TOOLS / "fuzz_readers.py").read_text())
    (readers,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "READERS"
        and isinstance(node.value, ast.Dict)
    ]
    assert [ast.literal_eval(key) for key in readers.keys] == list(FILES)


PLANTED = {
    "an exception": ("raise ValueError('odd')", "ValueError: odd"),
    "two lines": ("raise EdgekitError('a\\nb')", "not one line"),
    "a program": ("subprocess.run(['true'])", "it tried this: subprocess.Popen"),
    "a hidden program": (
        "hidden(lambda: os.system('true'))",
        "it tried this: os.system",
    ),
    "a connection": ("hidden(lambda: socket.create_connection(('127.0.0.1', 9)))", "it tried this: socket"),
    "a file": ("hidden(lambda: open('/root/.ssh/id_rsa'))", "it opened /root/.ssh/id_rsa"),
    "a written file": ("open('/usr/evil', 'w')", "PermissionError"),
    "memory": ("return bytearray(6 << 30)", "it takes too much memory"),
    "a crash": ("ctypes.string_at(0)", "it ended with -11"),
    "time": ("while True: pass", "it takes too long"),
}


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """planted(body): the module of a reader with this body; it misbehaves for the third file."""

    def plant(body):
        (tmp_path / "planted_readers.py").write_text(
            "import contextlib, ctypes, os, socket, subprocess\nfrom edgekit.errors import EdgekitError\n"
            "from fuzz_readers import Reader, one_file\ncalls = []\n"
            "def hidden(deed):\n    try:\n        deed()\n    except Exception:\n        pass\n"
            "def read(path):\n    calls.append(1)\n    if len(calls) == 4:\n"
            f"{textwrap.indent(body, '        ')}\n"
            "READERS = {'planted': Reader(lambda: [{'x': b'abc'}], one_file('x'), read)}\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "planted_readers"

    return plant


@pytest.mark.parametrize(("body", "words"), PLANTED.values(), ids=PLANTED)
def test_a_planted_misbehaviour_is_noticed(body, words, planted, tool):
    tally = tool.fuzz("planted", files=4, file_seconds=3, module=planted(body))
    assert tally.files == 4
    assert len(tally.failures) == 1, tally
    assert words in tally.failures[0]
    assert tally.failures[0].startswith("planted 2: ")


def test_a_reader_that_behaves_is_not_blamed(planted, tool):
    tally = tool.fuzz("planted", files=4, module=planted("raise EdgekitError('one line')"))
    assert (tally.accepted, tally.refused, tally.failures) == (3, 1, [])


def test_the_same_seed_gives_the_same_files(tool):
    import random

    files = {"a": b"some content = 5\n" * 9, "b": b'{"x": [1, 2]}'}
    made = [tool.changed(files, random.Random(f"0 {number}")) for number in range(300)]
    assert made == [tool.changed(files, random.Random(f"0 {number}")) for number in range(300)]
    assert sum(item != files for item in made) > 250
