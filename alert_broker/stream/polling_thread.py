"""Have calls carried out by the thread that polls.

Only one thread may use the consumer: the binding lets other threads wait until it is not polling, which may never
happen. Other threads therefore send requests, which the polling thread carries out between polls.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Event, get_ident
from typing import Any


class Request:
    """A request of another thread to the thread that polls."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self._done = call, Event()
        self._result: Any = None
        self._error: BaseException | None = None

    def serve(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self) -> Any:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class PollingThread:
    """The thread that made this object."""

    def __init__(self) -> None:
        self._thread = get_ident()
        self._requests: SimpleQueue[Request] = SimpleQueue()

    def ask(self, call: Callable[[], Any]) -> Any:
        """Return what the call returns in the polling thread, or raise what it raises there."""
        if get_ident() == self._thread:
            return call()
        self._requests.put(request := Request(call))
        return request.wait()

    def serve(self) -> None:
        """Carry out the requests of other threads. Only the polling thread may call this."""
        while True:
            try:
                self._requests.get_nowait().serve()
            except Empty:
                return
