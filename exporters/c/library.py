"""Compile model.c with the machine's own compiler, and load it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekit import cache
from edgekit.errors import EdgekitError

Array = npt.NDArray[np.float32]
COMPILERS = ("cc", "gcc", "clang")
# uses this machine's instructions; the cache's key contains the list of them
NATIVE = ("-std=c99", "-O3", "-march=native")
PLAIN = ("-std=c99", "-O2")  # uses the architecture's baseline: SSE2 on x86, NEON on 64-bit ARM


class Compiler:
    """A C compiler of this machine. command: its name or path; by default $CC, or the first of cc, gcc, clang."""

    def __init__(self, command: str | None = None) -> None:
        names = [command] if command else [name for name in (os.environ.get("CC"), *COMPILERS) if name]
        path = next((found for found in map(shutil.which, names) if found), None)
        if path is None:
            raise EdgekitError(
                f"no C compiler: none of {', '.join(names)} is here; install one (on Debian and Ubuntu: "
                "apt-get install gcc), name it in $CC, or use the runtime onnxruntime"
            )
        self.path: str = path

    def version(self) -> str:
        """Return the first line that the compiler prints for --version."""
        return self._run(["--version"], "say its version").partition("\n")[0]

    def macros(self, flags: Sequence[str]) -> str:
        """Return the compiler's predefined macros: its version and, for -march=native, the features of this CPU."""
        found = self._run([*flags, "-dM", "-E", "-x", "c", os.devnull], "say what it is")
        if "__STDC__" not in found:
            raise EdgekitError(f"{self.path} is no C compiler: it knows no macro __STDC__; name another one in $CC")
        return found

    def shared_library(self, model: str, header: str, flags: Sequence[str]) -> bytes:
        """Return model.c as a shared library."""
        return self._build(model, header, [*flags, "-shared", "-fPIC"], ["-lm"])

    def object_size(self, model: str, header: str, flags: Sequence[str]) -> int:
        """Return the size of the object file in bytes."""
        return len(self._build(model, header, [*flags, "-c"], []))

    def _build(self, model: str, header: str, flags: Sequence[str], libraries: Sequence[str]) -> bytes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            (folder / "model.c").write_text(model)
            (folder / "model.h").write_text(header)
            result = folder / "model.out"
            command = [*flags, str(folder / "model.c"), "-o", str(result), *libraries]
            self._run(command, "compile the model")
            if not result.is_file():
                raise EdgekitError(
                    f"{self.path} ended without an error and wrote no file; name another compiler in $CC"
                )
            return result.read_bytes()

    def _run(self, arguments: Sequence[str], purpose: str) -> str:
        command = [self.path, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise EdgekitError(f"{self.path} cannot be run ({error.strerror}); name another compiler in $CC") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            reason = next((line for line in lines if "error" in line), lines[0])
            raise EdgekitError(f"{self.path} cannot {purpose}: {reason}; name another compiler in $CC")
        return done.stdout


def keep_library(path: Path, content: bytes) -> None:
    """Keep a shared library in edgekit's cache with its hash behind it: loaders ignore bytes after the library."""
    cache.keep(path, content + hashlib.sha256(content).digest())
    if not is_complete(path):
        raise EdgekitError(f"{path}: the compiled library was changed while it was written; run the command again")


def is_complete(path: Path) -> bool:
    """Whether a library is in the cache and complete: loading a truncated one can end the process. Nobody but the user
    can exchange the file between the check and the loading, because the cache belongs to the user alone."""
    content = cache.read(path)
    return content is not None and hashlib.sha256(content[:-32]).digest() == content[-32:]


class Library:
    """A compiled model, loaded from a shared library. It does not know its shapes: callers check them."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            self._run = self._library.model_run
        except (OSError, AttributeError) as error:
            raise EdgekitError(f"{path}: not a compiled model ({error}); delete it, and it is compiled again") from None
        self._run.restype = None
        self.workspace = ctypes.c_size_t.in_dll(self._library, "model_workspace").value  # floats that each thread needs
        self.lanes = ctypes.c_int.in_dll(self._library, "model_lanes").value  # floats in a vector
        self.key = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self._library, "model_key"))).decode()

    def run(self, rows: int, arrays: Sequence[Array], workspace: Array) -> None:
        """Run the model. arrays: the inputs and then the output to write, contiguous, `rows` each. The call releases
        the interpreter's lock."""
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, workspace)]
        self._run(ctypes.c_size_t(rows), *pointers)
