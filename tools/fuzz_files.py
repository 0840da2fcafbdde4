"""Fuzz all that reads what strangers send, in a confined process: damaged and hostile files and messages by the
thousand.

    python tools/fuzz_files.py npz pack --seconds 600
    python tools/fuzz_files.py all --jobs 2 --json benchmarks/fuzz_files.json
    python tools/fuzz_files.py bundle --replay runs/fuzz/finds/bundle-0a1b2c3d

`fuzz_readers.py` lists the readers, each with a few valid files. `fuzz_changes.py` changes them, and `fuzz_worker.py`
gives each result to the reader. These are failures: an exit status other than 0, 1 and 2; more than one line of error;
a control character in what is printed; output of native code; more than SECONDS for one file, or more memory than the
read limit; a file left behind; and an attempt to start a program, to open a connection, to write outside the folder of
the file, or to open a file that the reader was not given. While a reader's work runs in the sandbox, the sandbox ends a
file that takes too much, so that is counted as stopped and is no failure.

If the reader is written in Python, the branches that it takes guide the changes (libFuzzer, from `pip install
atheris`); what libFuzzer found goes on in the next run from --folder. Ctrl-C ends the run with a report of what was
done, and --resume leaves out the readers that --json already has with as many seconds.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TOOLS = Path(__file__).resolve().parent
SECONDS = 20  # for one file
PROGRESS_SECONDS = 30.0  # between two lines of progress
MOST_FAILURES = 1000  # then a reader is repaired first
MOST_FINDS = 20  # inputs of failures that are stored for each reader
MEMORY_DISK = "/dev/shm" if Path("/dev/shm").is_dir() else None  # on a disk, most of the time is spent on the files
SHOWN = 10  # kinds of failures that are printed and reported


@dataclass(slots=True)
class Tally:
    """What became of the files. stopped: by a limit of the sandbox; failures: the number of the file, and what
    happened; finds: the inputs of the first failures; branches: those that libFuzzer saw, if it guided."""

    reader: str
    guided: bool = False
    files: int = 0
    accepted: int = 0
    refused: int = 0
    stopped: int = 0
    failures: list[str] = field(default_factory=list)
    finds: dict[str, bytes] = field(default_factory=dict, repr=False)
    restarts: int = -1
    branches: int = 0
    seconds: float = 0.0

    def count(self, event: dict[str, Any]) -> None:
        self.files += 1
        self.accepted += event.get("accepted", 0)
        self.refused += event.get("refused", 0)
        self.stopped += event.get("stopped", 0)
        if "failure" in event:
            self.failures.append(f"{self.reader} {self.files - 1}: {event['failure']}")
            if event["failure"] not in self.finds and len(self.finds) < MOST_FINDS:
                self.finds[event["failure"]] = base64.b64decode(event.get("input", ""))

    def to_json(self) -> dict[str, Any]:
        kinds = Counter(failure.partition(": ")[2] for failure in self.failures)
        shown = {name: value for name, value in asdict(self).items() if name not in ("failures", "finds")}
        shown["seconds"] = round(self.seconds, 1)
        return shown | {"failures": len(self.failures), "kinds": dict(kinds.most_common(SHOWN))}


class Stop:
    """Ends all workers at Ctrl-C."""

    def __init__(self) -> None:
        self.asked, self._running = threading.Event(), set[subprocess.Popen[str]]()

    def add(self, worker: subprocess.Popen[str]) -> None:
        self._running.add(worker)
        if self.asked.is_set():
            worker.kill()

    def ask(self) -> None:
        self.asked.set()
        for worker in list(self._running):
            worker.kill()


def fuzz(
    name: str,
    *,
    seed: int = 0,
    files: int | None = None,
    seconds: float = 1e9,
    file_seconds: int = SECONDS,
    module: str = "fuzz_readers",
    guided: bool = False,
    corpus: Path | None = None,
    replay: list[Path] | None = None,
    stop: Stop | None = None,
    progress: bool = False,
) -> Tally:
    """Give damaged files to a reader until it has read so many, or for so long. file_seconds: the limit of one file;
    corpus: where libFuzzer's inputs stay; replay: stored inputs to read first, or, without `files`, alone."""
    tally, started, stop = Tally(name, guided), time.monotonic(), stop or Stop()
    if replay is not None:
        files = len(replay) + (files or 0)
    options: dict[str, Any] = {
        "module": module,
        "name": name,
        "seed": seed,
        "last": 10**12 if files is None else files,
        "file_seconds": file_seconds,
        "way": "guided" if guided else "random",
        "replay": [str(path.resolve()) for path in replay or ()],
    }
    while not stop.asked.is_set() and len(tally.failures) < MOST_FAILURES:
        left = seconds - (time.monotonic() - started)
        if left <= 0 or (files is not None and tally.files >= files):
            break
        tally.restarts += 1
        end = started + seconds if progress else None
        ended = _run_worker(tally, options | {"first": tally.files, "seconds": left}, corpus, stop, end)
        tally.seconds = time.monotonic() - started
        if ended:
            break
    return tally


def _run_worker(
    tally: Tally, options: dict[str, Any], corpus: Path | None, stop: Stop, progress_until: float | None
) -> bool:
    """Read files in one confined process. Return whether it ended by itself; otherwise a file ended it."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY_DISK) as scratch, tempfile.TemporaryFile() as noise:
        kept = Path(scratch) / "corpus"
        if corpus is not None and corpus.is_dir():
            shutil.copytree(corpus, kept)
        kept.mkdir(exist_ok=True)
        own = {"HOME": scratch, "EDGEKIT_CACHE": f"{scratch}/cache", "TMPDIR": f"{scratch}/tmp", "OMP_NUM_THREADS": "1"}
        worker = subprocess.Popen(
            [sys.executable, str(TOOLS / "fuzz_worker.py"), json.dumps(options | {"folder": scratch})],
            stdout=subprocess.PIPE, stderr=noise, text=True, env=os.environ | own, cwd=scratch, start_new_session=True,
        )  # fmt: skip
        stop.add(worker)
        try:
            started = _listen(worker, tally, progress_until)
        finally:
            worker.kill()
            worker.communicate()
        noise.seek(0)
        said = noise.read().decode(errors="replace").strip().splitlines()
        branches = [int(found[1]) for line in said if (found := re.search(r" cov: (\d+) ", line))]
        tally.branches = max(tally.branches, *branches, 0)
        if corpus is not None and kept.is_dir():
            shutil.copytree(kept, corpus, dirs_exist_ok=True)
        if worker.returncode and not stop.asked.is_set():
            if not started:
                raise RuntimeError(f"the reader {tally.reader} cannot be started: {said[-1:]}")
            current = (Path(scratch) / "current").read_bytes()
            in_sandbox = (Path(scratch) / "sandboxed").exists()
            _count_death(tally, worker.returncode, said[-1:], current, in_sandbox=in_sandbox)
    return worker.returncode == 0


def _listen(worker: subprocess.Popen[str], tally: Tally, progress_until: float | None) -> bool:
    """Count what the worker reports. Return whether it has read the valid files and begun."""
    started, shown = False, time.monotonic()
    assert worker.stdout is not None
    for line in worker.stdout:
        event = json.loads(line)
        if "started" in event:
            started = True
            continue
        tally.count(event)
        if len(tally.failures) >= MOST_FAILURES:
            worker.kill()
        if progress_until is not None and time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            left = max(0, progress_until - shown)
            text = f"{tally.files:,} files, {len(tally.failures):,} failures, {left:,.0f} s left"
            print(f"{tally.reader}: {text}", file=sys.stderr, flush=True)
    worker.wait()
    return started


def _count_death(tally: Tally, status: int, said: list[str], current: bytes, *, in_sandbox: bool) -> None:
    if len(tally.failures) >= MOST_FAILURES:
        return
    limits = (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL)
    what = "it takes too long" if status in limits else f"it ended with {status} {said}"
    tally.count({"stopped": 1} if in_sandbox else {"failure": what, "input": base64.b64encode(current).decode()})


def store_finds(tally: Tally, folder: Path) -> None:
    """Write the inputs of failures to files, read each again alone, and print what then happens."""
    for what, data in tally.finds.items():
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{tally.reader}-{hashlib.sha256(data).hexdigest()[:8]}"
        path.write_bytes(data)
        again = fuzz(tally.reader, replay=[path]).failures
        print(f"    {path}: {what}\n        alone: {again[0] if again else 'it does not fail'}")


def table(tallies: list[Tally]) -> str:
    rows = [("reader", "guided", "files", "accepted", "refused", "stopped", "failures", "minutes")]
    for item in tallies:
        numbers = (item.files, item.accepted, item.refused, item.stopped, len(item.failures))
        guided = f"{item.branches:,} branches" if item.guided else "no"
        rows.append((item.reader, guided, *(f"{number:,}" for number in numbers), f"{item.seconds / 60:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def write_json(path: Path, machine: dict[str, str], done: dict[str, dict[str, Any]]) -> None:
    path.write_text(json.dumps({"machine": machine, "readers": done}, indent=1) + "\n")


def parsed(readers: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", choices=["all", *readers])
    parser.add_argument("--seconds", type=float, default=600, help="for each reader [default: 600]")
    parser.add_argument("--jobs", type=int, default=1, help="readers that are fuzzed at the same time [default: 1]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", action="store_true", help="do without libFuzzer")
    parser.add_argument("--folder", type=Path, default=Path("runs/fuzz"), help="inputs of libFuzzer and of failures")
    parser.add_argument("--json", type=Path, help="write the counts to this file after each reader")
    parser.add_argument("--resume", action="store_true", help="leave out what --json already has")
    parser.add_argument("--replay", type=Path, nargs="+", help="read these stored inputs of one reader again")
    return parser.parse_args()


def main() -> None:
    sys.path.insert(0, str(TOOLS))
    from fuzz_readers import READERS
    from fuzz_worker import GUIDED

    options = parsed(list(READERS))
    names = list(READERS) if "all" in options.readers else options.readers
    if options.replay:
        tally = fuzz(names[0], replay=options.replay)
        sys.exit("\n".join(tally.failures) or None)
    if not options.random and set(names) & set(GUIDED) and importlib.util.find_spec("atheris") is None:
        sys.exit("fuzz_files: needs atheris, which is not installed; run: pip install atheris, or pass --random")
    from bench_inference import describe_machine

    machine = describe_machine()  # with the commit at the start of the run
    done: dict[str, dict[str, Any]] = {}
    if options.json and options.json.is_file():
        done = json.loads(options.json.read_text())["readers"]
    if options.resume:
        names = [name for name in names if done.get(name, {}).get("seconds", 0) < options.seconds]
    stop, tallies, lock = Stop(), list[Tally](), threading.Lock()

    def run(name: str) -> None:
        if stop.asked.is_set():
            return
        guided = name in GUIDED and not options.random
        corpus = options.folder / "corpus" / name
        tally = fuzz(
            name, seed=options.seed, seconds=options.seconds, guided=guided, corpus=corpus, stop=stop, progress=True
        )
        with lock:
            tallies.append(tally)
            print(f"{name}: {len(tally.failures):,} failures", flush=True)
            if not stop.asked.is_set():
                store_finds(tally, options.folder / "finds")
                done[name] = {"commit": machine["commit"]} | tally.to_json()
                if options.json:
                    write_json(options.json, machine, done)

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for future in [pool.submit(run, name) for name in names]:
                future.result()
        except KeyboardInterrupt:
            stop.ask()
    print(table(sorted(tallies, key=lambda item: list(READERS).index(item.reader))))
    if stop.asked.is_set():
        sys.exit("fuzz_files: stopped; the table shows what was done, and --resume goes on with the other readers")
    sys.exit(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    main()
