"""The journal of a study: a line of JSON for each event, only ever appended to, each on disk before the next begins.

Lines hold no times and nothing of the machine, so the same study writes the same bytes, whether it was killed or not.
A line that a kill left unfinished is cut off. Each line has the hash of its event and of all events before it, so that
a changed file is noticed.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError

MOST_BYTES = 256 << 20
START = hashlib.sha256(b"edgekit study").hexdigest()[:16]


class Journal:
    """Events in the order in which they were appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events: list[dict[str, Any]] = []
        self.digest = START  # of all lines
        self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise EdgekitError(f"{path}: another process runs this study; wait for it, or stop it") from None
        kept = self._read()
        if self._file.tell() > kept:
            self._file.truncate(kept)
            os.fsync(self._file.fileno())

    def append(self, event: Mapping[str, Any]) -> None:
        """Write an event; it is on disk when this returns."""
        digest = self._digest_with(event)
        self._file.write(self._line(event, digest))
        self._file.flush()
        os.fsync(self._file.fileno())
        self.events.append(dict(event))
        self.digest = digest

    def close(self) -> None:
        self._file.close()

    def _digest_with(self, event: Mapping[str, Any]) -> str:
        text = json.dumps(event, sort_keys=True, allow_nan=False)
        return hashlib.sha256((self.digest + text).encode()).hexdigest()[:16]

    @staticmethod
    def _line(event: Mapping[str, Any], digest: str) -> bytes:
        return json.dumps({**event, "hash": digest}, sort_keys=True, allow_nan=False).encode() + b"\n"

    def _read(self) -> int:
        """Take the events of the file, and return the bytes of its finished lines."""
        if self.path.stat().st_size > MOST_BYTES:
            raise EdgekitError(f"{self.path}: more than {MOST_BYTES:,} bytes; no journal of a study")
        kept = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                event = json.loads(line)
                found = event.pop("hash")
                digest = self._digest_with(event)
            except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
                raise self._damaged(number, "is no event") from None
            if found != digest or self._line(event, digest) != line:
                raise self._damaged(number, "does not follow the lines before it")
            self.events.append(event)
            self.digest = digest
            kept += len(line)
        return kept

    def _damaged(self, number: int, what: str) -> EdgekitError:
        return EdgekitError(
            f"{self.path}: line {number} {what}: the file was changed; take it from a copy, or begin a new study"
        )
