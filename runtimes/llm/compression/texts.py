"""The text on which a compression is calibrated and measured, as windows of tokens."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.data.text import read_text
from edgekit.errors import EdgekitError
from runtimes.llm.engine import Ids
from runtimes.llm.tokenizer import Tokenizer

FEWEST = 128  # tokens of a text: two windows of 64


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of token ids. calibration: for the methods; held_out: for the measurements alone; sources: the names of
    the texts."""

    calibration: Sequence[Ids]
    held_out: Sequence[Ids]
    sources: Sequence[str]


def texts(tokenizer: Tokenizer, files: Sequence[Path], window: int, tokens: int) -> Texts:
    """Return up to `tokens` tokens for each of both uses, in windows of `window`. The windows of the text go to the two
    uses in turns, so that both see the same subjects and no token is in both. Without files the text is what ships: the
    licence of edgekit and the documentation of Python's language."""
    found = {str(path): read_text(path) for path in files} if files else shipped()
    ids = tokenizer.encode("\n\n".join(found.values()), begin=False)
    if len(ids) < FEWEST:
        raise EdgekitError(
            f"the text for calibration has {len(ids)} tokens ({', '.join(found)}); expected {FEWEST} or more: name "
            "longer files with --text"
        )
    size = min(window, len(ids) // 2)
    begin = tokenizer.encode("")  # the token for a beginning, if the model wants one
    windows = [np.concatenate([begin, ids[at : at + size]]) for at in range(0, len(ids) - size + 1, size)]
    most = max(1, tokens // size)
    return Texts(windows[0::2][:most], windows[1::2][:most], tuple(found))


def shipped() -> dict[str, str]:
    """Return the texts that every installation has, by name."""
    found = {}
    for file in importlib.metadata.files("edgekit") or ():
        if file.name == "LICENSE":
            found["the licence of edgekit"] = Path(str(file.locate())).read_text()
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions put it into a package of their own
        topics = {}
    if topics:
        found["the documentation of Python's language"] = "\n\n".join(topics[name] for name in sorted(topics))
    if not found:
        raise EdgekitError("no text for calibration ships with this installation; name files with --text")
    return found
