"""The one cache of edgekit: finished work is kept in it so that it is not done again.

The cache is the folder $EDGEKIT_CACHE, or edgekit's folder in the user's cache directory ($XDG_CACHE_HOME is followed).
Compiled code and engines are loaded from it and run with the user's rights. Therefore its folders are created for the
user alone (0700, files 0600), and a folder that somebody else owns or could write to is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import platformdirs

from edgekit.bundle.files import write_file
from edgekit.errors import EdgekitError

FILE_MODE = 0o600


def root() -> Path:
    """The cache's own folder, whether it exists or not."""
    given = os.environ.get("EDGEKIT_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("edgekit")


def folder(name: str) -> Path:
    """The cache's folder of this name, such as 'passes' or 'c'; it is created if it does not exist."""
    return private_folder(private_folder(root()) / name)


def private_folder(path: Path) -> Path:
    """The folder, which is created for this user alone if it does not exist; an error if another user owns it or
    could write to it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise _not_kept(path, error) from None
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise EdgekitError(
            f"{path}: the cache folder belongs to the user with id {found.st_uid}, and edgekit runs as {os.getuid()}; "
            "edgekit runs code from its cache, so it takes only its own user's folder: change the owner with chown, or "
            "set $EDGEKIT_CACHE to another folder"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise EdgekitError(
            f"{path}: the cache folder has the mode {stat.S_IMODE(found.st_mode):04o}, so other users can write to it; "
            f"edgekit runs code from its cache: run chmod go-w {path}, or set $EDGEKIT_CACHE to another folder"
        )
    return path


def keep(path: Path, content: bytes) -> None:
    """Write a file that only this user can read. Of two processes that write it at once, the last one's is kept."""
    try:
        write_file(path, content, mode=FILE_MODE)
    except OSError as error:
        raise _not_kept(path.parent, error) from None


def _not_kept(path: Path, error: OSError) -> EdgekitError:
    return EdgekitError(
        f"{path}: finished work cannot be kept there ({error.strerror}); set $EDGEKIT_CACHE to a folder that can be "
        "written and has room"
    )
