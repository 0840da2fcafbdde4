"""Do one piece of work on a file of a stranger in a process of its own, which is confined and can be killed.

The process gets bytes and gives bytes. It runs a function of edgekit with the rights that `confine` leaves: no network,
no programs, no writes outside a folder of its own, limited memory and time, and none of the user's environment
variables. The parent never unpickles what the process gives, because a file may have taken the process over.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import edgekit
from edgekit.bundle.bounded import limit
from edgekit.errors import EdgekitError

VARIABLE = "EDGEKIT_TIME_LIMIT"
SECONDS = 120  # of CPU time
WAITING = 4  # times the CPU time that the process may take in all: other programs use the CPU too
MEMORY = 4 << 30  # bytes of address space, in addition to the file's limit; torch alone maps two gigabytes
REFUSED, FAILED = 3, 4  # exit statuses: an EdgekitError, any other exception
# the environment of the process: what Python and its libraries need to start
PASSED_ON = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "LD_LIBRARY_PATH",
    "PYTHONHASHSEED",
    "SYSTEMROOT",
    "EDGEKIT_READ_LIMIT",
)
_layers: list[str] = []  # of this process, once it is confined


def run(function: str, content: bytes, source: str, *, seconds: int | None = None) -> bytes:
    """Call package.module:function, which takes bytes and a source for errors and returns bytes, in a confined process.

    source: what errors call the file; seconds: of CPU time, by default $EDGEKIT_TIME_LIMIT or 120. A process that is
    confined already calls the function itself. Raises EdgekitError with the function's own message, or with the limit
    that it hit."""
    if _layers:
        return _imported(function)(content, source)
    seconds = seconds or time_limit()
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch, tempfile.TemporaryFile() as given:
        given.write(content)
        given.seek(0)
        with tempfile.TemporaryFile() as result, tempfile.TemporaryFile() as noise:
            memory = MEMORY + limit(len(content))
            command = [sys.executable, "-P", "-m", __name__, function, source, scratch, str(memory), str(seconds)]
            status = _wait(command, scratch, (given, result, noise), seconds)
            result.seek(0)
            if status == 0:
                return result.read(limit(len(content)) + 1)
            said = " ".join(result.read(2000).decode(errors="replace").split())
            raise _error(status, said, source, seconds, memory)


def time_limit() -> int:
    """Return the CPU seconds that a confined process may take."""
    given = os.environ.get(VARIABLE, str(SECONDS))
    if not (given.isascii() and given.isdigit() and 0 < int(given[:9]) <= 10**6):
        raise EdgekitError(f"${VARIABLE} = {given[:40]!r}; expected a number of seconds from 1 to 1000000")
    return int(given)


def environment(scratch: str) -> dict[str, str]:
    """Return the environment variables of a confined process, whose home is the folder `scratch`."""
    found = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return found | {
        "PYTHONPATH": str(Path(edgekit.__file__).parents[1]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": scratch,
        "TMPDIR": scratch,
        "EDGEKIT_CACHE": scratch,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def _wait(command: list[str], scratch: str, files: tuple[IO[bytes], ...], seconds: int) -> int:
    given, result, noise = files
    with subprocess.Popen(
        command, stdin=given, stdout=result, stderr=noise, cwd=scratch, env=environment(scratch), start_new_session=True
    ) as process:
        try:
            return process.wait(WAITING * seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGXCPU
        finally:
            process.kill()


def _error(status: int, said: str, source: str, seconds: int, memory: int) -> EdgekitError:
    """Return the error for a process that did not end well."""
    if status == REFUSED:
        return EdgekitError(said)
    if status == -signal.SIGXCPU:
        return EdgekitError(
            f"{source}: it takes more than {seconds} s of CPU time to open or run the model; if you trust the "
            "file, raise the limit with: edgekit --time-limit SECONDS COMMAND"
        )
    if said.startswith("MemoryError") or status < 0:
        ended = "is out of memory" if status > 0 else f"was ended by signal {-status}"
        return EdgekitError(
            f"{source}: the process that opens the model {ended}, with a limit of {memory:,} bytes; if you trust the "
            "file, raise the limit with: edgekit --read-limit SIZE COMMAND"
        )
    return EdgekitError(f"{source}: the model cannot be opened: {said or f'exit status {status}'}")


def _imported(function: str) -> Callable[[bytes, str], bytes]:
    module, _, name = function.partition(":")
    found: Callable[[bytes, str], bytes] = getattr(importlib.import_module(module), name)
    return found


def layers() -> list[str]:
    """Return the layers that confine this process; an empty list in an ordinary one."""
    return list(_layers)


def serve(arguments: list[str]) -> int:
    """Do the work in the confined process: read standard input, and write the result or the error to standard
    output."""
    from edgekit.importers.confine import confine

    function, source, scratch, memory, seconds = arguments
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the result
    content = sys.stdin.buffer.read()
    file_size = limit(len(content)) + 1
    _layers.extend(confine(Path(scratch), memory=int(memory), seconds=int(seconds), file_size=file_size))
    status = 0
    try:
        found = _imported(function)(content, source)
    except EdgekitError as error:
        found, status = str(error).encode(errors="replace"), REFUSED
    except BaseException as error:  # anything that a hostile file can provoke
        found, status = f"{type(error).__name__}: {error}".encode(errors="replace"), FAILED
    output.write(found)
    output.flush()
    return status


if __name__ == "__main__":
    # the module runs as __main__; the code that it calls sees the module under its own name
    os._exit(importlib.import_module("edgekit.importers.sandbox").serve(sys.argv[1:]))
