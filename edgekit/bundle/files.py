"""Write files so that a crash, a full disk or Ctrl-C leaves the old file or the new one, never half of one."""

from __future__ import annotations

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


def write_file(path: Path, content: bytes) -> None:
    """Replace the file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_bytes(content)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, bytes]) -> None:
    """Write a new directory beside `path` and move it into place: a reader sees the old files or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    stale = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed and had the same id
    try:
        fresh.mkdir()
        for name, content in files.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        if path.exists():
            path.rename(stale)
        fresh.rename(path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if stale.exists() and not path.exists():
            stale.rename(path)
        shutil.rmtree(stale, ignore_errors=True)
