"""Run the exported C, compiled for this machine: for networks so small that a runtime spends most time on memory
traffic.

The session compiles the shared library once and keeps it in edgekit's cache. Its file name depends on the model, on
edgekit's generator, and on the compiler's description of itself and of this CPU.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import exporters
from edgekit import cache
from edgekit.bundle.family import find_family
from edgekit.bundle.format import Bundle, model_key
from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs
from edgekit.errors import EdgekitError
from edgekit.session import Session, check_inputs, open_session
from exporters.c.library import NATIVE, Compiler, Library, is_complete, keep_library
from runtimes.sessions.rows import cut, share_out

CHUNK = 16  # rows that a thread takes at a time: they take some milliseconds, so the cost of handing them out is small
AGREEMENT = 1e-5  # of a probability, on the bundle's golden rows; t2's float32 is up to 2e-6 away from float64


class CSession:
    """A bundle as compiled C, float32, on the CPU.

    threads: how many threads share the rows, by default one for each core. chunk: rows at a time. compiler: its
    command, by default $CC or the first of cc, gcc, clang. cache: folder for compiled models. Several threads may call
    a session.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        chunk: int | None = None,
        compiler: str | None = None,
        cache: str | Path | None = None,
    ) -> None:
        for name, value in (("threads", threads), ("chunk", chunk)):
            if value is not None and value < 1:
                raise EdgekitError(f"c: {name} = {value}; expected at least 1, or nothing for the default")
        self.inputs: Sequence[TensorSpec] = bundle.manifest.inputs
        self.outputs: Sequence[TensorSpec] = bundle.manifest.outputs
        self._library = _library(bundle, Compiler(compiler), _folder(cache))
        self._shapes = {spec.name: spec.shape[1:] for spec in self.inputs}
        self._threads = threads or len(os.sched_getaffinity(0))
        self._chunk = chunk or CHUNK
        self._pool = ThreadPoolExecutor(max(1, self._threads - 1), "edgekit-c")  # the calling thread works too
        self._local = threading.local()  # each thread has its own workspace
        self.provider = f"c ({self._library.lanes} lanes)"
        self.device = f"cpu ({self._threads} thread{'s' * (self._threads > 1)})"

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs by name, in the order of the inputs' rows."""
        rows = self._rows(arrays)
        spec = self.outputs[0]
        output = np.empty((rows, *map(int, spec.shape[1:])), np.float32)
        buffers = [*(np.ascontiguousarray(arrays[name]) for name in self._shapes), output]
        if self._threads == 1 or rows <= self._chunk:
            self._call(buffers, 0, rows)
            return {spec.name: output}
        pieces = cut(rows, self._chunk)
        share_out(self._pool, self._threads, pieces, lambda part: self._call(buffers, part.start, part.stop))
        return {spec.name: output}

    def warmup(self, batch: int) -> None:
        """Run once at this batch size, so that no later run pays for one-time work."""
        self.run(golden_inputs(tuple(self.inputs), batch))

    def _rows(self, arrays: Mapping[str, npt.NDArray[Any]]) -> int:
        """Return the batch size. A short test accepts valid arrays, because `check_inputs` takes a third of a row's
        time; `check_inputs` then explains what is wrong with invalid ones."""
        sizes = set()
        for name, shape in self._shapes.items():
            array = arrays.get(name)
            if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.shape[1:] != shape:
                break
            if not np.logical_and.reduce(np.isfinite(array), axis=None):
                break
            sizes.add(len(array))
        else:
            if len(sizes) == 1 and len(arrays) == len(self._shapes):
                return sizes.pop()
        return check_inputs(self.inputs, arrays)

    def _call(self, buffers: list[npt.NDArray[np.float32]], start: int, end: int) -> None:
        """Run rows `start` to `end` in this thread."""
        if not hasattr(self._local, "workspace"):
            self._local.workspace = np.empty(self._library.workspace, np.float32)
        self._library.run(end - start, [buffer[start:end] for buffer in buffers], self._local.workspace)


def open_fastest(bundle: Bundle, *, threads: int | None = None, chunk: int | None = None) -> Session:
    """Open the runtime `auto`: C if there is a compiler and C supports the family, else ONNX Runtime.

    C is several times faster per core (tools/bench_c.py). The function uses C only if it gives the bundle's golden
    outputs on this machine; if it does not, or if it does not compile, the function warns and uses ONNX Runtime.
    """
    if find_family(bundle.manifest.family).written_in_c and has_compiler():
        try:
            session = CSession(bundle, threads=threads, chunk=chunk)
            check_golden(session, bundle)
            return session
        except EdgekitError as error:
            warnings.warn(f"{error}; using onnxruntime", RuntimeWarning, stacklevel=2)
    return open_session(bundle, "onnxruntime", threads=threads, chunk=chunk)


def has_compiler() -> bool:
    try:
        Compiler()
    except EdgekitError:
        return False
    return True


def check_golden(session: Session, bundle: Bundle) -> None:
    """Raise unless the session gives the bundle's golden outputs, at batch 1 and with all rows at once."""
    inputs, expected = bundle.golden()
    first = {name: array[:1] for name, array in inputs.items()}
    for rows in (inputs, first):
        for name, got in session.run(rows).items():
            wanted = expected[name][: len(got)]
            allowed = AGREEMENT * max(1.0, float(np.abs(wanted).max(initial=0)))
            difference = float(np.abs(got - wanted).max(initial=0))
            if not difference <= allowed:  # also true for NaN
                raise EdgekitError(
                    f"{bundle.manifest.name} on {session.provider}: {name} is {difference:.1e} from its golden value, "
                    f"allowed {allowed:.1e}; another compiler ($CC) or runtime may do better"
                )


def _folder(given: str | Path | None) -> Path:
    """Return the folder for compiled models: the given one, or the cache's."""
    return cache.folder("c") if given is None else cache.private_folder(Path(given))


def _library(bundle: Bundle, compiler: Compiler, kept: Path) -> Library:
    """Return the bundle's compiled model from the cache, or compile it now."""
    path = kept / f"{_digest(model_key(bundle), compiler)}.so"
    if not is_complete(path):
        from exporters.c_export import CExporter  # this imports torch, which a compiled model does not need

        source = CExporter().source(bundle)
        keep_library(path, compiler.shared_library(source.model, source.header, NATIVE))
    return Library(path)


def _digest(key: str, compiler: Compiler) -> str:
    """Return a hash over all that the machine code depends on: model, generator, compiler, flags, and the CPU as the
    compiler describes it."""
    folder = Path(exporters.__file__).parent
    parts = [key.encode(), " ".join(NATIVE).encode(), compiler.macros(NATIVE).encode()]
    parts += [file.read_bytes() for file in (folder / "c_export.py", *sorted((folder / "c").glob("*.[cp]*")))]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
