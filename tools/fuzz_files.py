"""Fuzz the readers of files that may come from strangers: damaged and hostile files by the thousand.

    python tools/fuzz_files.py npz pack --seconds 600
    python tools/fuzz_files.py all --seconds 600 --json benchmarks/fuzz_files.json

`fuzz_readers.py` lists the readers, each with a few valid files. The engine changes bytes, numbers and values of these
files, always in the same way for the same seed, and gives each result to the reader in a confined process. Three things
are failures: an exception that is not an EdgekitError of one line; more than SECONDS or MEMORY for one file; and an
attempt to start a program, open a connection, or open a file that the reader was not given. For readers whose work runs
in the sandbox, the sandbox ends a file that takes too much, so that is counted as stopped and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 20, 5 << 30  # for one file
BYTES = (0, 1, 0x7F, 0x80, 0xFF, 0x0A, 0x22, 0x2E, 0x5B, 0x7B)
NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, -(2**63))
VALUES = (
    b"0",
    b"-1",
    b"1e999",
    b"1099511627776",
    b"9" * 40,
    b"1.5",
    b"null",
    b"true",
    b'""',
    b'"\\u0000"',
    b'"\\ud800"',
    b'"a\\nb"',
    b"[]",
    b"{}",
    b"[[[[[]]]]]",
    b"[" * 3000,
    b'"' + b"x" * 3000 + b'"',
    b'"../../etc/passwd"',
    b'"O"',
)
MOST_CHANGES = 4
PLACES = [os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
PLACES += ["/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev", str(Path(__file__).resolve().parents[1])]
PLACES += [os.path.realpath(place) for place in (sys.prefix, *filter(None, sys.path))]


@dataclass(slots=True)
class Tally:
    """What became of the files. stopped: by a limit of the sandbox; failures: the number of the file, and what
    happened."""

    reader: str
    files: int = 0
    accepted: int = 0
    refused: int = 0
    stopped: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def changed(files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    """The files with one to four changes."""
    result = dict(files)
    for _ in range(rng.randint(1, MOST_CHANGES)):
        name = rng.choice(sorted(result))
        result[name] = _changed(result[name], rng, [content for content in files.values() if content])
    return result


def _changed(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 2, 4, 16, 256)))
    other = rng.choice(others)
    start = rng.randrange(len(other))
    piece = other[start : start + rng.choice((1, 8, 64))]
    width = rng.choice((1, 2, 4, 8))
    number = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, rng.choice(("little", "big")))
    match rng.randrange(9):
        case 0:
            return content[:at] + bytes([rng.choice(BYTES)]) + content[at + 1 :]
        case 1 if at < len(content):
            return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        case 2:
            return content[:at] + number + content[at + width :]
        case 3:
            return content[:at]
        case 4:
            return content[:at] + content[end:]
        case 5:
            return content[:end] + content[at:]
        case 6:
            return content[:at] + piece + content[end:]
        case _:
            return _with_value(content, rng)


def _with_value(content: bytes, rng: random.Random) -> bytes:
    """JSON or TOML with one value replaced; other content with the value put somewhere."""
    marks = [at for at, byte in enumerate(content) if byte in b":=,[" and at + 1 < len(content)]
    at = rng.choice(marks) + 1 if marks else rng.randrange(len(content) + 1)
    end = next((n for n in range(at, len(content)) if content[n] in b",]}\n"), len(content))
    return content[:at] + b" " + rng.choice(VALUES) + content[end:]


def fuzz(
    name: str,
    *,
    seed: int = 0,
    files: int | None = None,
    seconds: float = 1e9,
    file_seconds: int = SECONDS,
    module: str = "fuzz_readers",
) -> Tally:
    """Give damaged files to a reader until it has read so many, or for so long. file_seconds: the limit of one file."""
    tally, started = Tally(name), time.monotonic()
    while time.monotonic() - started < seconds and (files is None or tally.files < files):
        left = min(seconds - (time.monotonic() - started), 1e9)
        numbers = (seed, tally.files, files or 10**12, left, file_seconds)
        _run_worker(tally, [module, name, *map(str, numbers)])
    tally.seconds = time.monotonic() - started
    return tally


def _run_worker(tally: Tally, arguments: list[str]) -> None:
    """Read files in one confined process, until it ends by itself or must be ended because of a file."""
    command = [sys.executable, __file__, "--worker", *arguments]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile() as noise:
        own = {"TMPDIR": scratch, "HOME": scratch, "EDGEKIT_CACHE": scratch, "OMP_NUM_THREADS": "1"}
        worker = subprocess.Popen(
            [*command, scratch], stdout=subprocess.PIPE, stderr=noise, text=True, env=os.environ | own, cwd=scratch
        )
        assert worker.stdout is not None
        confined = False
        with worker:
            for line in worker.stdout:
                event = json.loads(line)
                confined = event.pop("confined", confined)
                _count(tally, event)
        if worker.returncode:
            noise.seek(0)
            said = noise.read().decode(errors="replace").strip().splitlines()[-1:]
            if not tally.files and worker.returncode > 0:
                raise RuntimeError(f"the reader {tally.reader} cannot be started: {said}")
            limits = (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL)
            what = "it takes too long" if worker.returncode in limits else f"it ended with {worker.returncode} {said}"
            _count(tally, {"stopped": 1} if confined else {"failure": what})


def _count(tally: Tally, event: dict[str, Any]) -> None:
    tally.files += bool(event)
    tally.accepted += event.get("accepted", 0)
    tally.refused += event.get("refused", 0)
    tally.stopped += event.get("stopped", 0)
    if "failure" in event:
        tally.failures.append(f"{tally.reader} {tally.files - 1}: {event['failure']}")


def work(
    module: str, name: str, seed: str, first: str, last: str, seconds: str, file_seconds: str, scratch: str
) -> None:
    """The confined process: read one file after the other, and print what became of each as JSON."""
    import importlib

    from edgekit.errors import EdgekitError
    from edgekit.importers import sandbox
    from edgekit.importers.confine import confine

    sys.path.insert(0, str(Path(__file__).parent))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    reader = importlib.import_module(module).READERS[name]
    seeds = reader.seeds()
    folder = Path(scratch)
    reader.read(reader.write(seeds[0], folder))  # a valid file: what is imported later is imported now
    odd: list[str] = []
    sys.addaudithook(lambda event, arguments: _watch(event, arguments, folder, odd))
    sandbox._layers.extend(confine(folder, memory=MEMORY, seconds=10**6, file_size=1 << 30))
    print(json.dumps({"confined": reader.confined}), file=out, flush=True)
    started = time.monotonic()
    for number in range(int(first), int(last)):
        if time.monotonic() - started > float(seconds):
            break
        rng = random.Random(f"{seed} {number}")
        files = changed(rng.choice(seeds), rng)
        odd.clear()
        signal.alarm(int(file_seconds))
        try:
            path = reader.write(files, folder)
            odd.clear()
            reader.read(path)
            event: dict[str, Any] = {"accepted": 1}
        except EdgekitError as error:
            event = (
                {"refused": 1} if len(str(error).splitlines()) == 1 else {"failure": f"not one line: {str(error)!r}"}
            )
        except MemoryError:
            event = {"stopped": 1} if reader.confined else {"failure": "it takes too much memory"}
        except Exception as error:
            event = {"failure": f"{type(error).__name__}: {error}"[:300]}
        signal.alarm(0)
        print(json.dumps({"failure": odd[0]} if odd else event), file=out, flush=True)


def _watch(event: str, arguments: tuple[Any, ...], folder: Path, odd: list[str]) -> None:
    """Note what a reader was not asked to do. The sandbox refuses most of it; a reader could hide the refusal."""
    from edgekit.importers.confine import NEVER

    if event.startswith(NEVER):
        odd.append(f"it tried this: {event} {arguments!r}"[:300])
    elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        real = os.path.realpath(os.fsdecode(arguments[0]))
        if not any(real == place or real.startswith(f"{place}/") for place in (*PLACES, os.path.realpath(folder))):
            odd.append(f"it opened {real}"[:300])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        work(*sys.argv[2:])
        return
    sys.path.insert(0, str(Path(__file__).parent))
    from fuzz_readers import READERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", choices=["all", *READERS])
    parser.add_argument("--seconds", type=float, default=600, help="for each reader [default: 600]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    options = parser.parse_args()
    tallies = []
    for name in READERS if "all" in options.readers else options.readers:
        tally = fuzz(name, seed=options.seed, seconds=options.seconds)
        tallies.append(tally)
        kinds = Counter(failure.partition(": ")[2] for failure in tally.failures)
        print(
            f"{name}: {tally.files:,} files in {tally.seconds:.0f} s, {tally.accepted:,} accepted, {tally.refused:,} "
            f"refused, {tally.stopped:,} stopped, {len(tally.failures):,} failures"
        )
        for failure, count in kinds.most_common(10):
            print(f"    {count} times: {failure}")
    if options.json:
        options.json.write_text(json.dumps([asdict(tally) for tally in tallies], indent=1) + "\n")
    sys.exit(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    main()
