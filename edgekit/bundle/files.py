"""Write files so that after a crash, a full disk or Ctrl-C the old file or the new one exists, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from edgekit.errors import EdgekitError


def refuse_to_overwrite(path: Path, force: bool) -> None:
    """Raise if the path exists and `force` is not set. Commands call this before they start to work."""
    if path.is_dir():
        raise EdgekitError(f"{path} is a directory; name a file to write")
    if path.exists() and not force:
        raise EdgekitError(f"{path} already exists; choose another name or pass --force to replace it")


def is_plain(name: str) -> bool:
    """Return whether a file name, or a path below a folder, stays in that folder whatever links the folder holds."""
    parts = name.split("/")
    return not any(part in ("", ".", "..") for part in parts) and "\0" not in name and "\\" not in name


def write_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace the file in one step. mode: its permissions, which the umask reduces."""
    with replacing(path, mode=mode) as stream:
        stream.write(content)


@contextlib.contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Provide a stream to a temporary file, which replaces the file in one step when the block ends without an error
    and is deleted otherwise. mode: its permissions, which the umask reduces."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = _temporary(path, "")
    try:
        new.unlink(missing_ok=True)  # left by a killed process with the same id
        with open(new, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as stream:
            yield stream
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, bytes], *, mode: int = 0o666) -> None:
    """Write a new directory next to `path` and rename it to `path`: a reader sees the old files or the new ones. If
    several processes or threads do so at the same time, the last one's files stay. mode: the files' permissions, as in
    `write_file`."""
    for name in files:
        if not is_plain(name):
            raise EdgekitError(
                f"{path}: a file named {name[:60]!r} would be written outside the folder; do not trust it"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    new, stale = _temporary(path, ".new"), _temporary(path, ".old")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed process with the same id
    try:
        folder_mode = mode | (mode & 0o444) >> 2  # those who may read the files may enter the folder
        new.mkdir(folder_mode)
        for name, content in files.items():
            for parent in reversed((new / name).relative_to(new).parents[:-1]):
                (new / parent).mkdir(folder_mode, exist_ok=True)
            _create(new / name, content, mode)
        _replace(path, new, stale)
    except BaseException:
        # there was no old directory, or another process has renamed its own to this path
        with contextlib.suppress(OSError):
            stale.rename(path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def _temporary(path: Path, ending: str) -> Path:
    """Return a path in the same folder that no other process or thread uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{ending}")


def _create(path: Path, content: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)  # left by a killed process with the same id
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    path.write_bytes(content)


def _replace(path: Path, new: Path, stale: Path) -> None:
    """Rename the directory `new` to `path`, and the old one to `stale`."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.rename(stale)
        try:
            new.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # another process has renamed its own directory to this path: replace that one
            shutil.rmtree(stale, ignore_errors=True)
