"""Run a command in a child process, so that the parent can end it whatever native code runs in it.

A model of a stranger can keep a runtime busy for ever, fill the memory, or crash it. Python hears no signal while a
runtime computes. The parent therefore only waits: it passes Ctrl-C and SIGTERM on, kills a child that has not ended
after a second, and says in one line why a child died. The child may take the memory that is free when it starts.

The process forks before it loads a runtime, which costs some milliseconds. On systems without fork the command runs
unsupervised.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edgekit import machine
from edgekit.errors import EdgekitError

GRACE_SECONDS = 1.0  # from a signal until the child is killed
AGAIN_SECONDS = 0.5  # from a signal until its exception is raised again
STOPPED = 130  # exit status after Ctrl-C; SIGTERM has 143, as shells number them
DIE_WITH_PARENT = 1  # of prctl


class Terminated(BaseException):
    """SIGTERM. It is no KeyboardInterrupt, because click replaces that by its own exception."""


@contextmanager
def terminating() -> Iterator[None]:
    """In this block SIGTERM raises `Terminated`, as Ctrl-C raises KeyboardInterrupt. So files that are being written
    are removed, and the command prints a line.

    Some libraries drop every exception that is raised at some points, for example while they look for an optional
    package. The exception is therefore raised again and again until one is being handled on its way out of the block.
    """
    told: list[BaseException] = []

    def receive(number: int, frame: Any) -> None:
        told.append(Terminated("stopped by SIGTERM") if number == signal.SIGTERM else KeyboardInterrupt())
        if hasattr(signal, "setitimer"):
            before.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, remind))
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        raise told[-1]

    def remind(number: int, frame: Any) -> None:
        if not _stops(sys.exc_info()[1]):
            raise told[-1]

    handlers = {signal.SIGTERM: receive}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = receive
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    except Exception:
        # Python's C code replaces what a signal handler raises at some of its points, and a library that dropped it may
        # fail soon after: numba, when the signal comes while its compiler calls it back
        if told:
            raise told[-1] from None
        raise
    finally:
        if told and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _stops(error: BaseException | None) -> bool:
    """Return whether the error is one that a signal raised, or came while one was being handled."""
    while error is not None and not isinstance(error, (Terminated, KeyboardInterrupt)):
        error = error.__cause__ or error.__context__
    return error is not None


def supervise(memory: int | None = None) -> None:
    """Return in a child process, which goes on with the command. This process waits for it, and ends with its status.
    memory: bytes that the child may take, by default all that is free."""
    if not hasattr(os, "fork"):
        return
    allowed = memory or machine.memory_bytes()[1]
    parent = os.getpid()
    child = os.fork()
    if child:
        os._exit(_wait(child, allowed))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to both; the parent passes it on as SIGTERM
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(STOPPED)
    _limit_memory(allowed)


def _limit_memory(allowed: int) -> None:
    """Limit the memory that this process writes to. Address space that a driver only reserves does not count."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if allowed and (hard == resource.RLIM_INFINITY or allowed < hard):
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))


def _wait(child: int, allowed: int) -> int:
    """Return the exit status of the command."""
    told: list[int] = []

    def kill(number: int, frame: Any) -> None:
        os.kill(child, signal.SIGKILL)

    def stop(number: int, frame: Any) -> None:
        told.append(number)
        os.kill(child, signal.SIGTERM if len(told) == 1 else signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)

    signal.signal(signal.SIGALRM, kill)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status >= 0:
        return status if not told or status == 0 else STOPPED if told[0] == signal.SIGINT else 128 + told[0]
    if told:
        _say("stopped")
        return STOPPED if told[0] == signal.SIGINT else 128 + told[0]
    _say(str(_death(-status, allowed)))
    return 1


def _death(number: int, allowed: int) -> EdgekitError:
    """Return the error for a child that a signal ended, which nobody had sent."""
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    memory = f", which may take {allowed:,} bytes of memory" if allowed else ""
    return EdgekitError(
        f"{' '.join(sys.argv[1:])[:200]}: the process that ran the command{memory}, was ended by {name}; the model may "
        "be damaged, or need more memory: edgekit --memory-limit SIZE COMMAND"
    )


def _say(message: str) -> None:
    from edgekit.cli.console import printable

    print(printable(f"edgekit: {message}"), file=sys.stderr, flush=True)
