"""Files are replaced whole or not at all."""

from pathlib import Path

import pytest

from edgekit.bundle.files import refuse_to_overwrite, write_file
from edgekit.errors import EdgekitError


def test_write_and_replace(tmp_path):
    path = tmp_path / "a" / "b.bin"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert list(path.parent.iterdir()) == [path]


def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.bin"
    write_file(path, b"one")

    def full(self, content):
        self.touch()
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"two")
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
