"""Files are replaced whole or not at all."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgekit.bundle.files import refuse_to_overwrite, replacing, write_directory, write_file
from edgekit.errors import EdgekitError


def test_write_and_replace(tmp_path):
    path = tmp_path / "a" / "b" / "c.bin"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "b.bin"
    write_file(path, b"one")

    def fail():
        with replacing(path) as stream:
            stream.write(b"tw")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_file(path, "a text, which cannot be written")
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_needs_force_and_a_folder_is_never_overwritten(tmp_path):
    path = tmp_path / "b.bin"
    refuse_to_overwrite(path, force=False)
    path.touch()
    refuse_to_overwrite(path, force=True)
    with pytest.raises(EdgekitError, match="--force"):
        refuse_to_overwrite(path, force=False)
    with pytest.raises(EdgekitError, match="directory"):
        refuse_to_overwrite(tmp_path, force=True)


@pytest.fixture
def umask():
    """No permission is taken away."""
    before = os.umask(0)
    yield
    os.umask(before)


def modes(path):
    return {str(item.relative_to(path.parent)): item.stat().st_mode & 0o777 for item in [path, *path.rglob("*")]}


@pytest.mark.parametrize(("mode", "folder"), [(0o600, 0o700), (0o640, 0o750), (0o644, 0o755), (0o666, 0o777)])
def test_who_may_read_a_file_may_enter_its_folder(mode, folder, umask, tmp_path):
    path = tmp_path / "deep" / "er" / "x"
    write_directory(path, {"in/ner/c": b"3", "a": b"1", "in/b": b"2", "in/ner/d": b"4"}, mode=mode)
    assert modes(path) == {
        **dict.fromkeys(("x", "x/in", "x/in/ner"), folder),
        **dict.fromkeys(("x/a", "x/in/b", "x/in/ner/c", "x/in/ner/d"), mode),
    }
    assert (path / "in/ner/d").read_bytes() == b"4"
    write_file(tmp_path / "file", b"x", mode=mode)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_by_default_only_the_umask_restricts_who_may_read_and_write(umask, tmp_path):
    write_file(tmp_path / "file", b"x")
    write_directory(tmp_path / "x", {"a": b"1"})
    assert modes(tmp_path / "file") == {"file": 0o666}
    assert modes(tmp_path / "x") == {"x": 0o777, "x/a": 0o666}


@pytest.mark.parametrize("write", [write_file, lambda path, content: write_directory(path, {"a": content})])
def test_threads_that_write_one_path_at_the_same_time_leave_one_of_their_contents(write, tmp_path):
    path, contents = tmp_path / "x", [bytes([letter]) * 50_000 for letter in b"abcd"]
    start = threading.Barrier(len(contents))

    def write_often(content):
        start.wait()
        for _ in range(60):
            write(path, content)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write_often, contents))
    assert (path if path.is_file() else path / "a").read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("old", [True, False])
def test_another_process_that_writes_at_the_same_time_is_replaced(old, tmp_path, monkeypatch):
    """Each time the new directory is about to move in, another process has put its own there, twice."""
    path, rename, others = tmp_path / "x", Path.rename, [b"theirs", b"theirs again"]
    if old:
        write_directory(path, {"a": b"old"})

    def race(self, target):
        if target == path and others:
            path.mkdir()
            (path / "a").write_bytes(others.pop())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", race)
    write_directory(path, {"a": b"ours"})
    assert others == []
    assert (path / "a").read_bytes() == b"ours"
    assert list(tmp_path.iterdir()) == [path]
