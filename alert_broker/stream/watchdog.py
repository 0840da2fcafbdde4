"""End the process if a call into the Kafka client does not return.

librdkafka can wait for ever inside a call that has a time limit, for example in `send_offsets_to_transaction` after the
broker was killed. No Python code can end such a call. The watchdog therefore ends the process, with one line that names
the call, and with exit status 75 ("try again"), so that a supervisor starts a new process. Nothing is lost: the new
process continues at the last committed offset.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock, Thread, get_ident

LOG = logging.getLogger("edgekit.stream")
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
MARGIN_SECONDS = 10.0  # that a call may take beyond its own limit, on a loaded machine
LOOK_SECONDS = 0.25  # between looks at the calls that are running
LAST_WORDS_SECONDS = 5.0  # to write the log line and the report, which an output that nobody reads may block
ADVICE = "nothing is lost: start the process again, and it continues at the last committed offset"


@dataclass(slots=True)
class Call:
    """A call that is running. seconds: its own limit; started: monotonic seconds."""

    name: str
    seconds: float
    started: float


class Watchdog:
    """Watches calls of any thread. end: ends the process with this exit status; a test passes another function."""

    def __init__(self, end: Callable[[int], None] = os._exit) -> None:
        self.last_words: Callable[[str], None] = lambda reason: None  # called with the reason before the process ends
        self._end, self._stopped, self._lock = end, Event(), Lock()
        self._calls: dict[int, list[Call]] = {}  # by thread; the last one is the innermost
        self._thread: Thread | None = None

    @contextmanager
    def limit(self, name: str, seconds: float) -> Iterator[None]:
        """Call the client in this block. While a call runs inside another one of the same thread, as callbacks do, the
        limit of the outer one does not count; it starts again afterwards."""
        thread = get_ident()
        with self._lock:
            if self._thread is None:
                self._thread = Thread(target=self._look, name="edgekit-watchdog", daemon=True)
                self._thread.start()
            self._calls.setdefault(thread, []).append(Call(name, seconds, time.monotonic()))
        try:
            yield
        finally:
            with self._lock:
                running = self._calls[thread]
                running.pop()
                if running:
                    running[-1].started = time.monotonic()
                else:
                    del self._calls[thread]

    def running(self) -> list[Call]:
        """The innermost call of each thread, the oldest first."""
        with self._lock:
            return sorted((calls[-1] for calls in self._calls.values()), key=lambda call: call.started)

    def close(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            now = time.monotonic()
            for call in self.running():
                if now - call.started > call.seconds + MARGIN_SECONDS:
                    self.end(
                        f"the call {call.name} of the Kafka client has not returned for {now - call.started:.0f} s; "
                        f"its limit is {call.seconds:.0f} s"
                    )
                    return

    def end(self, reason: str) -> None:
        """End the process with status 75, at once or, if its output is blocked, after `LAST_WORDS_SECONDS`."""
        writer = Thread(target=self._say, args=(reason,), name="edgekit-last-words", daemon=True)
        writer.start()
        writer.join(LAST_WORDS_SECONDS)
        self._end(TRY_AGAIN)

    def _say(self, reason: str) -> None:
        LOG.critical("%s; the process ends with status %d; %s", reason, TRY_AGAIN, ADVICE)
        try:
            self.last_words(reason)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except Exception:  # such as a pipe whose reader has gone
            LOG.exception("the report could not be written")

    @contextmanager
    def ending_within(self, seconds: float) -> Iterator[None]:
        """After SIGTERM or SIGINT in this block, end the process if the block has not ended within these seconds.

        A Python signal handler runs only when the main thread returns from the call that it is in, which may be never.
        The interpreter writes the number of the signal to a socket at once, and a thread reads it there.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = Thread(target=self._wait_for_signal, args=(reader, seconds), name="edgekit-signals", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            writer.close()
            thread.join()
            reader.close()

    def _wait_for_signal(self, reader: socket.socket, seconds: float) -> None:
        while number := reader.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                break
        else:
            return
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            reader.settimeout(left)
            try:
                if not reader.recv(1):
                    return  # the block has ended
            except TimeoutError:
                break
        calls = ", ".join(f"{call.name} for {time.monotonic() - call.started:.0f} s" for call in self.running())
        self.end(f"the process was told to stop {seconds:.0f} s ago and has not ended; running: {calls or 'no call'}")


WATCHDOG = Watchdog()  # of this process, as it is the process that ends
