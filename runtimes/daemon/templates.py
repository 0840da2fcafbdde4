"""A confined process that renders one conversation after another: to start one for each takes a quarter of a second.

It has the rights that `edgekit.importers.confine` leaves, and gets the same requests as a process for one conversation.
After `SECONDS` of CPU time the system ends it; it leaves by itself after half of them, between two conversations.
"""

from __future__ import annotations

import importlib
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Lock, Timer
from typing import IO

from edgekit.bundle.bounded import limit
from edgekit.errors import EdgekitError
from edgekit.importers import sandbox
from runtimes.llm.chat import render

SECONDS = 30  # of CPU time, for all conversations of a process
WALL_SECONDS = 20.0  # for one conversation
MEMORY = 1 << 30  # bytes of address space
HEAD = struct.Struct("<BQ")  # status, length
DONE, REFUSED = 0, 1
LARGEST = 64 << 20  # bytes of a request, and of an answer


class TemplateProcess:
    """Renders the conversations of one model, one at a time. Any thread may call it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._lock = Lock()

    def run(self, function: str, content: bytes, source: str) -> bytes:
        """Render, as `runtimes.llm.chat.conversation` asks for it. A process that has left is replaced."""
        assert function == "runtimes.llm.chat:render"
        with self._lock:
            for _ in range(2):
                if self._process is None:
                    self._start()
                if (answer := self._ask(content, source)) is not None:
                    break
                self._end()
        if answer is None:
            raise EdgekitError(
                f"{source}: the chat template was ended, because it took more than {WALL_SECONDS:.0f} s or "
                f"{MEMORY >> 20} MiB; use a model with another template"
            )
        status, text = answer
        if status == REFUSED:
            raise EdgekitError(text.decode(errors="replace"))
        return text

    def close(self) -> None:
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="edgekit-")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, self._scratch.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._scratch.name,
            env=sandbox.environment(self._scratch.name),
            start_new_session=True,
        )

    def _ask(self, content: bytes, source: str) -> tuple[int, bytes] | None:
        """Return status and text; None if the process has ended before it answered."""
        process, name = self._process, source.encode(errors="replace")
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        timer = Timer(WALL_SECONDS, process.kill)
        timer.start()
        try:
            _write(process.stdin, DONE, name)
            _write(process.stdin, DONE, content)
            return _read(process.stdout)
        except OSError:  # its end of the pipe is closed
            return None
        finally:
            timer.cancel()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        if self._scratch is not None:
            self._scratch.cleanup()
        self._process = self._scratch = None


def _write(stream: IO[bytes], status: int, content: bytes) -> None:
    stream.write(HEAD.pack(status, len(content)) + content)
    stream.flush()


def _read(stream: IO[bytes]) -> tuple[int, bytes] | None:
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size:
        return None
    status, size = HEAD.unpack(head)
    content = stream.read(size) if size <= LARGEST else b""
    return (status, content) if len(content) == size else None


def serve(scratch: str) -> None:
    """Answer in the confined process, until the other side ends."""
    from edgekit.importers.confine import confine

    importlib.import_module("jinja2.sandbox")  # before the rights to look for it are gone
    given, output = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    confine(Path(scratch), memory=MEMORY, seconds=SECONDS, file_size=limit(0))
    while time.process_time() < SECONDS / 2 and (name := _read(given)) and (content := _read(given)):
        try:
            status, found = DONE, render(content[1], name[1].decode())
        except EdgekitError as error:
            status, found = REFUSED, str(error).encode(errors="replace")
        _write(output, status, found)


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)
