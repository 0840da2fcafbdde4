"""The confined process of `fuzz_files.py`: it changes valid files, gives them to one reader, and checks each outcome.

It gets its options as JSON and prints one line of JSON for each file. There are three ways to make files: `random`
draws the changes from a seed and the number of the file; `guided` lets libFuzzer choose them by the branches that the
reader takes (atheris); and stored files are read again. The same checks follow in each.
"""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fuzz_changes import Files, changed, decode, encode

MEMORY = 5 << 30  # bytes of address space
FILE_BYTES = 1 << 30  # of a file that the reader writes
START_SECONDS = 300  # for each valid file: the first one imports torch and compiles kernels
# The Python modules whose branches guide libFuzzer. The other readers do their work in compiled libraries, where there
# are no branches of Python to follow: safetensors (Rust), the parser of onnx (C++), and the stages of the stream, whose
# Avro reader `fuzz_coverage.py` covers.
GUIDED = {
    "npz": ("edgekit.bundle", "numpy.lib", "zipfile"),
    "bundle": ("edgekit.bundle", "edgekit.compression", "edgekit.cli"),
    "pack": ("edgekit.bundle", "edgekit.compression"),
    "recipe": ("edgekit.compression.recipe", "edgekit.settings", "edgekit.passes", "tomllib"),
    "target": ("edgekit.targets", "edgekit.settings", "tomllib"),
    "image": ("edgekit.data", "PIL"),
    "hugging-face": ("edgekit.importers", "edgekit.nn.hugging_face"),
    "language-folder": (
        *("edgekit.importers.safetensors_files", "runtimes.llm.hugging_face", "runtimes.llm.rope"),
        *("runtimes.llm.vocabulary", "runtimes.llm.tokenizer", "runtimes.llm.source"),
    ),
    "pt2": ("edgekit.importers",),
    "registry": ("alert_broker.stream.registry", "alert_broker.containers", "alert_broker.avro.plan", "http.client"),
    "broker": ("alert_broker.stream.config", "alert_broker.stream.filters", "edgekit.settings", "tomllib"),
    "cutout": ("alert_broker.cutouts.fits", "alert_broker.cutouts.inflate"),
    "gguf": (
        *("edgekit.importers.gguf", "runtimes.llm.architecture", "runtimes.llm.rope", "runtimes.llm.vocabulary"),
        *("runtimes.llm.tokenizer", "runtimes.llm.chat"),
    ),
}
# what a reader may open beside its file: Python, its packages, and the system's own files
READABLE = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
READABLE += ["/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", str(Path(__file__).resolve().parents[1])]
READABLE += [os.path.realpath(path) for path in (sys.prefix, *filter(None, sys.path))]


class Check:
    """Give files to a reader and return what became of them. Its calls go through `edgekit.cli.main`, as a command's
    do, so an error becomes an exit status and what the command prints.

    A command gives some work to the sandbox, which has its own limits and whose output nobody sees. Here this process
    is the sandbox. The file `sandboxed` exists while it does such work, and stays if a limit ends the work: then the
    file counts as stopped. All other work must keep the limits that SECURITY.md promises."""

    def __init__(self, reader: Any, folder: Path, seconds: int) -> None:
        import click

        from edgekit import cli

        self.reader, self.folder, self.seconds, self.path = reader, folder, seconds, folder
        self.odd: list[str] = []
        self.out_of_memory = False
        self.mark = folder / "sandboxed"
        self.peak = self.noise = 0  # bytes of memory, and of output of native code, outside the sandbox
        self._reset = os.open("/proc/self/clear_refs", os.O_WRONLY) if Path("/proc/self/clear_refs").exists() else None
        self.left: set[str] = set()  # in the temporary folder, by the last file
        self.usual: set[str] = set()  # what libraries leave there for a valid file, too
        # the same two streams for every file: loggers keep the one that they saw first
        self._printed = [io.BytesIO(), io.BytesIO()]
        self._streams = [io.TextIOWrapper(item, encoding="utf-8", write_through=True) for item in self._printed]
        self._main = cli.main
        debug = click.Option(["--debug"], is_flag=True)
        cli.edgekit = click.Command("edgekit", params=[debug], callback=lambda debug: self._read())  # type: ignore[assignment]
        sys.argv = ["edgekit"]

    def __call__(self, files: Files) -> dict[str, Any]:
        """Return {"accepted": 1}, {"refused": 1}, {"stopped": 1}, or a failure with its input."""
        (self.folder / "current").write_bytes(encode(files))
        signal.alarm(self.seconds)
        self.path = self.reader.write(files, self.folder / "given")
        self.odd.clear()
        self.out_of_memory = False
        self.mark.unlink(missing_ok=True)
        self.peak = self.noise = 0
        self._begin()
        before = memory_of("VmRSS")
        found = self._outcome()
        self._end()
        signal.alarm(0)
        self._check_promises(self.peak - before, sum(map(len, files.values())))
        self.left = {path.name for path in (self.folder / "tmp").iterdir()} - self.usual
        if self.odd or self.left:
            found = self.odd[0] if self.odd else f"it left {min(self.left)} in the temporary folder"
        for path in (self.folder / "tmp" / name for name in self.left):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if isinstance(found, str):
            return {"failure": found[:300], "input": base64.b64encode(encode(files)).decode()}
        return found

    def _begin(self) -> None:
        """Forget the largest memory so far, and note how much native code has printed."""
        if self._reset is not None:
            os.write(self._reset, b"5")
        self._printed_before = os.fstat(2).st_size

    def _end(self) -> None:
        self.peak = max(self.peak, memory_of("VmHWM"))
        self.noise += os.fstat(2).st_size - self._printed_before

    def _check_promises(self, taken: int, size: int) -> None:
        from edgekit.bundle.bounded import limit

        if taken > limit(size) + self.reader.memory:
            self.odd.append(f"it takes {taken >> 20} MiB for {size:,} bytes")
        if self.noise:
            printed = os.pread(2, 200, os.fstat(2).st_size - self.noise).decode(errors="replace")
            self.odd.append(f"native code prints {printed!r}")

    def sandboxed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the sandbox's `run` for this process, which is confined already."""

        def call(*arguments: Any, **options: Any) -> Any:
            self._end()
            self.mark.touch()
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    found = function(*arguments, **options)
            except MemoryError:
                raise
            except BaseException:
                self.mark.unlink(missing_ok=True)
                raise
            finally:
                self._begin()
            self.mark.unlink(missing_ok=True)
            return found

        return call

    def _read(self) -> None:
        from edgekit.errors import EdgekitError

        try:
            self.reader.read(self.path)
        except EdgekitError as error:  # the command line would join its lines; Python's callers see all of them
            if len(str(error).splitlines()) != 1:
                self.odd.append(f"not one line: {str(error)!r}")
            raise
        except MemoryError:
            self.out_of_memory = True
            raise

    def _outcome(self) -> dict[str, int] | str:
        for item in self._printed:
            item.seek(0)
            item.truncate()
        status: Any = None
        try:
            with contextlib.redirect_stdout(self._streams[0]), contextlib.redirect_stderr(self._streams[1]):
                self._main()
        except SystemExit as end:
            status = end.code
        except Exception as error:
            if not self.out_of_memory:
                return f"{type(error).__name__}: {error}"
        if self.out_of_memory:
            return {"stopped": 1} if self.mark.exists() else "it takes too much memory"
        return self._judged(status, *(item.getvalue().decode(errors="replace") for item in self._printed))

    def _judged(self, status: Any, printed: str, error: str) -> dict[str, int] | str:
        lines = error.splitlines()
        if status not in (0, 1, 2):
            return f"exit status {status}"
        if len(lines) > 1 or (status and not lines):
            return f"exit status {status} with {len(lines)} lines of error: {error[:200]!r}"
        if odd := next((letter for letter in printed + error if not letter.isprintable() and letter not in "\n\t"), ""):
            return f"it prints the control character {odd!r}"
        return {"refused" if status else "accepted": 1}

    def watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Note what a reader was not asked to do. The sandbox refuses most of it; a reader could hide the refusal."""
        from edgekit.importers import confine

        if event.startswith(confine.NEVER):
            self.odd.append(f"it tried this: {event} {arguments!r}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            flags = arguments[2]
            self._note_path(arguments[0], writes=isinstance(flags, int) and bool(flags & confine.WRITING))
        elif event in confine.CHANGING and isinstance(arguments[0], str | bytes | os.PathLike):
            self._note_path(arguments[0], writes=True)

    def _note_path(self, path: Any, *, writes: bool) -> None:
        real = os.path.realpath(os.fsdecode(path))
        allowed = [os.path.realpath(self.folder), *([os.devnull] if writes else READABLE)]
        if not any(real == path or real.startswith(f"{path}/") for path in allowed):
            self.odd.append(f"it {'changed' if writes else 'opened'} {real}")


def work(options: dict[str, Any]) -> None:
    """Read one file after the other, and print what became of each as JSON."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(options["folder"])
    for name in ("given", "tmp"):
        (folder / name).mkdir()
    guided = options["way"] == "guided"
    modules = GUIDED.get(options["name"], (options["module"],))
    with _instrumented(modules) if guided else contextlib.nullcontext():
        from edgekit.importers import confine, sandbox

        sandbox._layers.append("fuzzer")  # this process is the sandbox: it starts no other
        reader = importlib.import_module(options["module"]).READERS[options["name"]]
        seeds = reader.seeds()
        check = Check(reader, folder, START_SECONDS)
        sandbox.run = check.sandboxed(sandbox.run)
        for files in seeds:  # what is imported later is imported now, and libraries do what they do once
            check(files)
            check.usual |= check.left
        events = [check(files) for files in seeds]
    if "accepted" not in events[0] or any("failure" in event for event in events):
        raise RuntimeError(f"a valid file is not read: {[event.get('failure', event) for event in events]}")
    check.seconds = options["file_seconds"]
    sys.addaudithook(check.watch)
    confine.NEVER = tuple(event for event in confine.NEVER if event not in reader.allowed)
    confine.confine(folder, memory=MEMORY, seconds=10**6, file_size=FILE_BYTES)

    def report(files: Files) -> None:
        print(json.dumps(check(files)), file=out, flush=True)

    print(json.dumps({"started": True}), file=out, flush=True)
    change = getattr(reader, "change", None) or changed
    if guided:
        _guide(report, change, seeds, options)
    for files in itertools.chain(_replayed(options), _drawn(change, seeds, options)):
        report(files)


def memory_of(name: str) -> int:
    """Return a line of the kernel's account of this process in bytes; 0 on systems without it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


def _drawn(change: Callable[..., Files], seeds: list[Files], options: dict[str, Any]) -> Iterator[Files]:
    """Yield changed files, always the same ones for the same seed and number."""
    started, replayed = time.monotonic(), len(options["replay"])
    for number in range(max(0, options["first"] - replayed), options["last"] - replayed):
        if time.monotonic() - started > options["seconds"]:
            return
        rng = random.Random(f"{options['seed']} {number}")
        yield change(rng.choice(seeds), rng)


def _replayed(options: dict[str, Any]) -> Iterator[Files]:
    for path in options["replay"][options["first"] :]:
        files = decode(Path(path).read_bytes())
        if files is None:
            raise RuntimeError(f"{path} is no set of files that this tool has written")
        yield files


@contextlib.contextmanager
def _instrumented(modules: tuple[str, ...]) -> Iterator[None]:
    """Count the branches of modules that are imported while the block runs."""
    import atheris

    with atheris.instrument_imports(include=list(modules)):
        (finder,) = [item for item in sys.meta_path if type(item).__name__ == "AtherisMetaPathFinder"]
        find = finder.find_spec  # it would take whole packages, and with them functions that numba compiles
        finder.find_spec = lambda name, *rest: find(name, *rest) if name.startswith(modules) else None  # type: ignore[method-assign]
        yield


def _guide(report: Callable[[Files], None], change: Any, seeds: list[Files], options: dict[str, Any]) -> None:
    """Let libFuzzer choose the changes until the time is over; this never returns."""
    import atheris

    def known(data: bytes) -> Files | None:
        """The files; None for libFuzzer's empty input, and for sets that another version of this tool has stored."""
        files = decode(data)
        return files if files is not None and any(files.keys() == item.keys() for item in seeds) else None

    def one(data: bytes) -> None:
        files = known(data)
        if files is not None:
            report(files)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        # most of what libFuzzer keeps is refused, so some changes begin with a valid file
        files = (known(data) if rng.random() < 0.6 else None) or rng.choice(seeds)
        if rng.random() < 0.5:
            made = change(files, rng)
        else:
            name = rng.choice(sorted(files))
            made = files | {name: bytes(atheris.Mutate(files[name], len(files[name]) + 64))}
        encoded = encode(made)
        return encoded if len(encoded) <= most else data

    corpus = Path(options["folder"]) / "corpus"
    for number, files in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(encode(files))
    most = 4 * max(len(encode(files)) for files in seeds) + 8192
    handled = [f"-handle_{name}=0" for name in ("abrt", "bus", "fpe", "ill", "int", "segv", "term", "xfsz")]
    limits = [f"-max_total_time={max(1, int(options['seconds']))}", f"-max_len={most}", "-timeout=0", "-rss_limit_mb=0"]
    runs = [f"-runs={options['last'] - options['first']}"] if options["last"] < 10**9 else []
    seed = options["seed"] + options["first"] + 1  # another one after each restart
    atheris.Setup(["fuzz", str(corpus), f"-seed={seed}", *limits, *runs, *handled], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    try:
        work(json.loads(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # libraries may wait for ever when the interpreter ends inside libFuzzer
