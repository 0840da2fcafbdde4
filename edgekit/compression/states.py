"""The states of a model between passes, which are kept in the cache: their folder, and the facts on which their names
depend."""

from __future__ import annotations

import hashlib
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import edgekit
from edgekit import cache, plugins
from edgekit.bundle.files import write_directory
from edgekit.bundle.format import MANIFEST, Bundle

LARGEST = 2 << 30  # bytes of states that are kept, the newest first
PASSES = "edgekit.passes"


def folder() -> Path:
    """Return the cache's folder of states."""
    return cache.folder("passes")


def keep(path: Path, bundle: Bundle) -> None:
    """Write the state after a pass as a bundle that only this user can read. If two processes write it at once, the
    bundle of the last one remains, complete."""
    write_directory(path, {**bundle.contents, MANIFEST: bundle.manifest.to_json()}, mode=cache.FILE_MODE)


def prune(states: Path, largest: int = LARGEST) -> None:
    """Delete the oldest states until the rest fit."""
    found: list[tuple[float, int, Path]] = []
    for state in states.glob("*.edge"):
        try:
            size = sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
            found.append((state.stat().st_mtime, size, state))
        except FileNotFoundError:  # another process has deleted or replaced it
            continue
    total = 0
    for _, size, state in sorted(found, reverse=True):
        total += size
        if total > largest:
            shutil.rmtree(state, ignore_errors=True)


def pass_identity(name: str) -> list[str]:
    """Return what the result of a pass depends on besides its parameters: the name and the version of the distribution
    that registers the pass, and a hash of source code.

    The hash covers every Python file of edgekit, and every Python file of the top-level package of the pass (only the
    pass's module, if that is in no package). It does not cover other packages that the pass imports; the job's key
    holds the versions of those that edgekit's own passes use. A pass without a file, such as one that was typed into an
    interpreter, has a new identity each time, so that its states are never taken from the cache.
    """
    digest = hashlib.sha256()
    module = plugins.load(PASSES, name).__module__
    own = () if module.partition(".")[0] == edgekit.__name__ else _sources(module)
    for label, content in (*_sources(edgekit.__name__), *own):
        digest.update(f"{label}\0".encode() + hashlib.sha256(content).digest())
    return [*plugins.distribution(PASSES, name), digest.hexdigest()]


def _sources(module: str) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of each source file of the module and of its top-level package, in a fixed
    order."""
    file = getattr(sys.modules.get(module), "__file__", None)
    top = getattr(sys.modules.get(module.partition(".")[0]), "__file__", None)
    if file is None or not Path(file).is_file():
        yield module, uuid.uuid4().bytes
        return
    yield module, Path(file).read_bytes()
    if top is not None and Path(top).name == "__init__.py":
        package = Path(top).parent
        for path in sorted(package.rglob("*.py")):
            yield str(path.relative_to(package)), path.read_bytes()
