"""The one cache of edgekit: finished work is kept in it so that it is not done again.

The cache is the folder $EDGEKIT_CACHE, or edgekit's folder in the user's cache directory ($XDG_CACHE_HOME is followed).
Compiled code and engines are loaded from it and run with the user's rights. Therefore its folders are created for the
user alone (0700, files 0600). A folder or file that somebody else owns or could write to is refused, and so is a cache
whose parent folder somebody else could exchange. Nobody but the user and root can then change a file of the cache, so
the hashes inside its files only have to detect files that were cut short.
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
    """Return the cache's own folder, whether it exists or not."""
    given = os.environ.get("EDGEKIT_CACHE")
    return Path(given) if given else platformdirs.user_cache_path("edgekit")


def folder(name: str) -> Path:
    """Return the cache's folder of this name, such as 'passes' or 'c'; create it if it does not exist."""
    return private_folder(private_folder(root()) / name)


def private_folder(path: Path) -> Path:
    """Return the folder; create it for this user alone if it does not exist. Raises if another user owns it or could
    write to it, or could put another folder in its place."""
    try:
        for item in (*reversed(path.parents), path):  # mkdir(parents=True) would open the parents as the umask allows
            if not item.exists():
                item.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        raise _not_kept(path, error) from None
    if problem := _problem(found):
        raise EdgekitError(f"{path}: the cache folder {problem}; {_remedy(path, found)}")
    for parent in dict.fromkeys((*path.absolute().parents, *path.resolve().parents)):
        found = parent.stat()
        if problem := _problem(found, strict=False):
            raise EdgekitError(
                f"{path}: the folder {parent} above the cache {problem}, who could put another cache there; "
                f"{_remedy(parent, found)}"
            )
    return path


def _problem(found: os.stat_result, *, strict: bool = True) -> str:
    """Return why another user could change a folder or a file; "" if no other user can. strict: neither may root own
    it, nor may it be a folder in which users can only delete their own files, such as /tmp."""
    if not hasattr(os, "getuid"):
        return ""
    owners = {os.getuid()} if strict else {0, os.getuid()}
    if found.st_uid not in owners:
        return f"belongs to the user with id {found.st_uid}, and edgekit runs as {os.getuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (strict or not found.st_mode & stat.S_ISVTX):
        return f"has the mode {stat.S_IMODE(found.st_mode):04o}, so it can be written by other users"
    return ""


def _remedy(path: Path, found: os.stat_result) -> str:
    change = "change the owner with chown" if found.st_uid != os.getuid() else f"run chmod go-w {path}"
    return f"edgekit runs code from its cache: {change}, or set $EDGEKIT_CACHE to another folder"


def keep(path: Path, content: bytes) -> None:
    """Write a file that only this user can read. Of two processes that write it at once, the last one's is kept."""
    try:
        write_file(path, content, mode=FILE_MODE)
    except OSError as error:
        raise _not_kept(path.parent, error) from None


def read(path: Path) -> bytes | None:
    """Return the content of a file of the cache; None if there is no such file. Raises if another user owns it or could
    write to it, and if it is a link: its target could be a file of anybody. The checks are of the open file."""
    try:
        stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise EdgekitError(f"{path}: the cached file cannot be opened ({error.strerror}); delete it") from None
    with stream:
        found = os.fstat(stream.fileno())
        if problem := _problem(found) if stat.S_ISREG(found.st_mode) else "is not a plain file":
            raise EdgekitError(f"{path}: the cached file {problem}; edgekit runs code from its cache: delete the file")
        return stream.read()


def check_tree(path: Path) -> Path:
    """Return the folder of the cache. Raises if another user owns or could write to it or to anything inside it."""
    for item in (path, *path.rglob("*")) if path.exists() else ():
        found = item.lstat()
        problem = _problem(found) if not stat.S_ISLNK(found.st_mode) else "is a link"
        if problem:
            raise EdgekitError(f"{item}: the cached file {problem}; edgekit trusts its cache: delete {path}")
    return path


def _not_kept(path: Path, error: OSError) -> EdgekitError:
    return EdgekitError(
        f"{path}: finished work cannot be kept there ({error.strerror}); set $EDGEKIT_CACHE to a folder that can be "
        "written and has room"
    )
