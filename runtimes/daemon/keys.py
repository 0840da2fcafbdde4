"""API keys. Only their hashes are stored: a key has 256 random bits, so that one SHA-256 is enough for it.

A line of the file, or of the environment variable, is `NAME:HASH`. The name stands in logs and metrics.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from edgekit.errors import EdgekitError
from runtimes.daemon.config import NAME, KeySettings
from runtimes.daemon.refusal import RefusedError

VARIABLE = "EDGEKIT_SERVE_KEYS"  # lines as in the file, separated by commas or line ends
PREFIX = "ek_"
HASH = re.compile(r"[0-9a-f]{64}")
LARGEST = 1 << 20  # bytes of the file


def new_key(name: str) -> tuple[str, str]:
    """Return a new key, and the line for the file."""
    if not NAME.fullmatch(name):
        raise EdgekitError(f"the name {name!r} of a key; expected up to 64 letters, digits, '.', '_' and '-'")
    key = PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}:{hashed(key)}"


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode(errors="replace")).hexdigest()


def load(settings: KeySettings) -> dict[str, str]:
    """Return the hash of each key by its name, of the file and the environment."""
    found = _lines(os.environ.get(VARIABLE, "").replace(",", "\n"), VARIABLE)
    if settings.file:
        path = Path(settings.file)
        try:
            content = path.read_bytes()[:LARGEST]
            shared = path.stat().st_mode & stat.S_IWOTH
        except OSError as error:
            raise EdgekitError(f"keys.file {settings.file}: {error.strerror}") from None
        if shared:
            raise EdgekitError(f"keys.file {settings.file}: every user may write to it; run: chmod o-w {settings.file}")
        found |= _lines(content.decode(errors="replace"), settings.file)
    return found


def _lines(text: str, source: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        name, _, digest = entry.partition(":")
        if not NAME.fullmatch(name) or not HASH.fullmatch(digest):  # the line is not shown: it may be a key
            raise EdgekitError(f"{source}, line {number}: expected NAME:HASH, as `edgekit serve --new-key NAME` prints")
        if name in found:
            raise EdgekitError(f"{source}, line {number}: the name {name!r} is there twice")
        found[name] = digest
    return found


class Keys:
    """Checks keys, and how often each is used. clock: seconds."""

    def __init__(
        self, hashes: Mapping[str, str], per_minute: int = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.hashes, self._per_minute, self._clock = hashes, per_minute, clock
        self._left: dict[str, tuple[float, float]] = {}  # requests that a key may send now, and when that was true

    def check(self, authorization: str | None) -> str:
        """Return the name of the key in a header; "" if no keys are needed. Raises RefusedError for a wrong one, and
        for one that is used too often."""
        if not self.hashes:
            return self._limited("")
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise RefusedError(401, "an API key is needed: send the header Authorization: Bearer KEY")
        digest, name = hashed(key.strip()), ""
        for known, expected in self.hashes.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(digest, expected):
                name = known
        if not name:
            raise RefusedError(401, "the API key is not known")
        return self._limited(name)

    def _limited(self, name: str) -> str:
        """Take one request from what the name may send: it gets `per_minute` of them in a minute, steadily."""
        if self._per_minute:
            now = self._clock()
            left, since = self._left.get(name, (float(self._per_minute), now))
            left = min(self._per_minute, left + (now - since) * self._per_minute / 60)
            if left < 1:
                self._left[name] = left, now
                wait = int((1 - left) * 60 / self._per_minute) + 1
                raise RefusedError(
                    429, f"more than {self._per_minute} requests in a minute; try again later", retry_after=wait
                )
            self._left[name] = left - 1, now
        return name
