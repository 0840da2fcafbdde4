"""Where finished work is kept so that it is not done again: $EDGEKIT_CACHE, or edgekit's folder in the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

LARGEST = 2 << 30  # bytes of states that are kept, newest first


def folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("EDGEKIT_CACHE") or Path(home) / "edgekit")


def passes_folder() -> Path:
    """States of models between passes, each under the hash of all it depends on."""
    return folder() / "passes"


def prune(states: Path, largest: int = LARGEST) -> None:
    """Delete the oldest states until the rest fit."""
    found = (
        sorted(states.glob("*.edge"), key=lambda path: path.stat().st_mtime, reverse=True) if states.is_dir() else []
    )
    total = 0
    for state in found:
        total += sum(file.stat().st_size for file in state.rglob("*") if file.is_file())
        if total > largest:
            shutil.rmtree(state, ignore_errors=True)
