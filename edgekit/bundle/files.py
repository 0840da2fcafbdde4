"""Write files so that a crash, a full disk or Ctrl-C leaves the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from edgekit.errors import EdgekitError


def refuse_to_overwrite(path: Path, force: bool) -> None:
    """Raise if the path is taken and `force` was not given; called before the work starts, not after."""
    if path.is_dir():
        raise EdgekitError(f"{path} is a directory; name a file to write")
    if path.exists() and not force:
        raise EdgekitError(f"{path} already exists; choose another name or pass --force to replace it")


def write_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace the file in one step. mode: its permissions, from which the umask takes some away."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _create(fresh, content, mode)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, bytes], *, mode: int = 0o666) -> None:
    """Write a new directory beside `path` and move it into place: a reader sees the old files or the new ones. Several
    processes may do so at once; the last one's is kept. mode: the files' permissions, as in `write_file`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    stale = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed and had the same id
    try:
        folder_mode = mode | (mode & 0o444) >> 2  # who may read the files may enter the folder
        fresh.mkdir(folder_mode)
        for name, content in files.items():
            for parent in reversed((fresh / name).relative_to(fresh).parents[:-1]):
                (fresh / parent).mkdir(folder_mode, exist_ok=True)
            _create(fresh / name, content, mode)
        _replace(path, fresh, stale)
    except BaseException:
        with contextlib.suppress(OSError):  # nothing was moved away, or another process has moved its own there
            stale.rename(path)
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(stale, ignore_errors=True)


def _create(path: Path, content: bytes, mode: int) -> None:
    path.unlink(missing_ok=True)  # of a process that was killed and had the same id
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    path.write_bytes(content)


def _replace(path: Path, fresh: Path, stale: Path) -> None:
    """Move the directory `fresh` to `path`, and what was there to `stale`."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.rename(stale)
        try:
            fresh.rename(path)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(stale, ignore_errors=True)  # another process has moved its own there: replace that
