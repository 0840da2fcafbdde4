"""Read text files for language models."""

from __future__ import annotations

from pathlib import Path

from edgekit.bundle.bounded import read_file
from edgekit.errors import EdgekitError


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8."""
    if not path.is_file():
        raise EdgekitError(f"{path}: no such file; expected a text")
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise EdgekitError(f"{path}: byte {error.start} is not UTF-8; expected a text in UTF-8") from None
