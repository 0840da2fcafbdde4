"""Compare the native engine of language models with llama.cpp and ik_llama.cpp: the same file, in turns, in one run.

    python tools/bench_llm.py --llama package/bins/linux-x64 --ik build/bin/llama-bench --json benchmarks/llm.json
    python tools/bench_llm.py --part "SmolLM2 Q4_1" --llama package/bins/linux-x64
    python tools/bench_llm.py --table benchmarks/llm.json

Each engine lives in a process of its own, which waits while another one is timed. A round times every engine once, and
another engine begins each round. A time is the CPU time of one step (of all steps for a prompt), or with two threads
the time that passed; a ratio is the median of the ratios of the same round, against the better of the others.
ik_llama.cpp is timed by its own llama-bench before and after the rounds; its fastest sample of all its options counts,
against our median. --llama: the folder of the npm package @node-llama-cpp/linux-x64, which has code for each CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgekit import __version__, machine
from edgekit.cost.timing import in_turns
from edgekit.importers import downloads
from edgekit.importers.gguf import read_gguf
from exporters.c.library import Compiler
from runtimes.llm.architecture import from_gguf
from runtimes.llm.engine import Engine, Item
from runtimes.llm.llamacpp_engine import LlamaCppEngine
from runtimes.llm.measure import memory_rate
from runtimes.llm.native_engine import NativeEngine
from tests.gguf_files import encoded, gguf, toy_metadata, toy_weights

SECONDS = 10.0  # for each row, all engines together
CHUNK = 512  # tokens of a step of a prompt
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX2_FILES = ("libggml-base.so", "libggml.*.so", "libllama.*.so", "libggml-cpu-haswell.so")
# Qwen2.5-0.5B's layers, width, hidden units and vocabulary, with heads of 128 instead of 64, seven to one of keys
WIDE_HEADS = {
    "layers": 24, "width": 896, "heads": 7, "kv_heads": 1, "head_size": 128, "hidden": 4864, "vocabulary": 151_936,
}  # fmt: skip
CPU, WALL = 0, 1  # clocks


@dataclass(frozen=True)
class Row:
    """A step that is timed. sequences: for each, the tokens it has before and those that the step appends."""

    name: str
    sequences: Sequence[tuple[int, int]]

    @property
    def is_prompt(self) -> bool:
        return all(before == 0 for before, _ in self.sequences)


ROWS = (
    Row("4 tokens at 128", [(128, 4)]),
    Row("1 token at 128", [(128, 1)]),
    Row("1 token at 2,048", [(2048, 1)]),
    Row("1 token at 7,600", [(7600, 1)]),
    Row("8 sequences at 512", [(512, 1)] * 8),
    Row("7 sequences and a chunk of 56 at 512", [(512, 1)] * 7 + [(512, 56)]),
    Row("prompt of 512", [(0, 512)]),
    Row("prompt of 2,048", [(0, 2048)]),
)
SHORT = tuple(row for row in ROWS if row.name not in ("1 token at 7,600", "prompt of 2,048"))


@dataclass(frozen=True)
class Contender:
    """An engine as it is timed. ours: whether it is the native one; many: it only takes rows of several sequences."""

    name: str
    options: Mapping[str, Any]
    ours: bool = False
    many: bool = False

    def takes(self, row: Row) -> bool:
        return not self.many or len(row.sequences) > 1


@dataclass(frozen=True)
class Part:
    """What is compared in one run. form: of the matrices; "" for the file as it is; clock: CPU or WALL."""

    name: str
    model: str
    form: str = ""
    threads: int = 1
    avx2: bool = False
    rows: Sequence[Row] = ROWS


PARTS = (
    Part("SmolLM2 Q4_1", "smollm2"),
    Part("SmolLM2 Q4_0", "smollm2", "Q4_0", rows=SHORT),
    Part("SmolLM2 Q8_0", "smollm2", "Q8_0", rows=SHORT),
    Part("SmolLM2 Q4_1, AVX2", "smollm2", avx2=True, rows=SHORT),
    Part("SmolLM2 Q4_1, 2 threads", "smollm2", threads=2, rows=SHORT),
    Part("heads of 128, Q4_0", "wide", "Q4_0", rows=SHORT),
)


# --- files


def file_of(part: Part, folder: Path) -> Path:
    """Return the model's file; it is made if the folder has none."""
    if part.model == "smollm2" and not part.form:
        return downloads.find("smollm2")
    path = folder / f"{part.model}-{part.form}.gguf"
    if not path.exists():
        content = wide_heads(part.form) if part.model == "wide" else requantised(downloads.find("smollm2"), part.form)
        path.write_bytes(content)
    return path


def requantised(path: Path, form: str) -> bytes:
    """Return the file with its 4-bit matrices in another format; the embedding keeps its 8 bits."""
    file = read_gguf(path)
    metadata = {key: list(map(int, v)) if isinstance(v, np.ndarray) else v for key, v in file.metadata.items()}
    tensors = {}
    for name, tensor in file.tensors.items():
        kind = form if tensor.format.name.startswith("Q4") else tensor.format.name
        tensors[name] = kind, tensor.shape, encoded(tensor.values(), kind)
    return gguf(metadata, tensors)


def wide_heads(form: str) -> bytes:
    """Return a model with random weights; all layers have those of the first one, which does not change the speed."""
    tensors = {}
    for name, values in toy_weights("qwen2", **{**WIDE_HEADS, "layers": 1}).items():
        kind = "F32" if values.ndim == 1 else "Q8_0" if name == "token_embd.weight" else form
        tensor = kind, values.shape, encoded(values, kind)
        numbers = range(WIDE_HEADS["layers"]) if name.startswith("blk.0.") else [0]
        tensors |= {name.replace("blk.0.", f"blk.{number}."): tensor for number in numbers}
    metadata = toy_metadata("qwen2", **WIDE_HEADS) | {"qwen2.context_length": 8192}
    return gguf(metadata, tensors)


# --- an engine in a process of its own


class Bench:
    """An engine with the sequences of a row."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ids = np.random.default_rng(0).integers(0, engine.architecture.vocabulary, 8192)

    def prepare(self, row: Row) -> None:
        """Give each sequence the tokens that it has before the step."""
        wanted = dict(enumerate(before for before, _ in row.sequences if before))
        for sequence in list(self.engine.blocks.tables):
            if self.engine.length(sequence) > wanted.get(sequence, 0) or len(wanted) != len(self.engine.blocks.tables):
                self.engine.remove(sequence)
        for sequence, before in wanted.items():
            while (length := self.engine.length(sequence)) < before:
                self.engine.step([Item(sequence, self.ids[length : min(length + CHUNK, before)], logits="none")])

    def run(self, row: Row) -> tuple[float, float]:
        """Return the seconds of CPU and of the clock that the row takes. Afterwards all is as before."""
        steps = []
        for at in range(0, max(tokens for _, tokens in row.sequences), CHUNK):
            steps.append(
                [
                    Item(sequence, self.ids[before + at : before + min(at + CHUNK, tokens)])
                    for sequence, (before, tokens) in enumerate(row.sequences)
                ]
            )
        started = time.process_time(), time.perf_counter()
        for step in steps:
            self.engine.step(step)
        taken = time.process_time() - started[0], time.perf_counter() - started[1]
        for sequence, (before, _) in enumerate(row.sequences):
            kept = self.engine.truncate(sequence, before)
            assert kept == before
        return taken

    def bytes_read(self, row: Row) -> int | None:
        """Return the bytes that one token to each sequence reads: the weights once, and each one's cache."""
        weights = self.engine.bytes_read(0)
        if weights is None or any(tokens > 1 for _, tokens in row.sequences):
            return None
        caches = [(self.engine.bytes_read(before) or 0) - weights for before, _ in row.sequences]
        return weights + sum(caches)


def serve(pipe: Connection, path: Path, contender: Contender) -> None:
    """Answer what the other side of the pipe asks of a `Bench`, until it closes."""
    model = from_gguf(read_gguf(path))
    kind = NativeEngine if contender.ours else LlamaCppEngine
    bench = Bench(kind(model, rows=CHUNK, **contender.options))
    pipe.send(getattr(bench.engine, "lanes", "") or bench.engine.library.instructions)  # type: ignore[attr-defined]
    with contextlib.suppress(EOFError):
        while True:
            name, row = pipe.recv()
            pipe.send(getattr(bench, name)(row))


class Remote:
    """A `Bench` in another process."""

    def __init__(self, path: Path, contender: Contender) -> None:
        self._pipe, other = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self.process = spawn.Process(target=serve, args=(other, path, contender), daemon=True)
        self.process.start()
        other.close()
        self.build: str = self.answer()

    def send(self, name: str, row: Row) -> None:
        self._pipe.send((name, row))

    def answer(self) -> Any:
        return self._pipe.recv()

    def ask(self, name: str, row: Row) -> Any:
        self.send(name, row)
        return self.answer()

    def close(self) -> None:
        self._pipe.close()
        self.process.join()


@contextlib.contextmanager
def opened(path: Path, contenders: Sequence[Contender]) -> Iterator[dict[str, Remote]]:
    with contextlib.ExitStack() as stack:
        found = {}
        for contender in contenders:
            found[contender.name] = Remote(path, contender)
            stack.callback(found[contender.name].close)
        yield found


def contenders_of(part: Part, llama: Path | None, folder: Path) -> list[Contender]:
    tokens = max(sum(before + tokens for before, tokens in row.sequences) for row in part.rows)
    common = {"blocks": -(-tokens // 16) + 80, "threads": part.threads}
    flags = {"flags": AVX2} if part.avx2 else {}
    found = [Contender(f"native {kv}", {"kv": kv, **common, **flags}, ours=True) for kv in ("f16", "int8", "int4")]
    if part.threads > 1:
        found += [Contender(f"{c.name}, 1 thread", {**c.options, "threads": 1}, ours=True) for c in found[::2]]
    if llama is not None:
        library = avx2_folder(llama, folder) if part.avx2 else llama
        for name, on in (("off", False), ("on", True)):
            options = {"library": library, "flash_attention": on, **common}
            found.append(Contender(f"llama.cpp, flash attention {name}", options))
        apart = {**options, "shared": False, "sequences": 8, "flash_attention": False, "blocks": 8 * 48}
        found.append(Contender("llama.cpp, a cache for each", apart, many=True))
    return found


def avx2_folder(llama: Path, folder: Path) -> Path:
    """Return a folder with the parts of llama.cpp that a CPU without AVX-512 would load."""
    made = folder / "avx2"
    made.mkdir(exist_ok=True)
    for pattern in AVX2_FILES:
        for file in llama.glob(pattern):
            if not (made / file.name).exists():
                (made / file.name).symlink_to(file.resolve())
    return made


# --- ik_llama.cpp, by its own program


def ik_seconds(program: Path, path: Path, row: Row, threads: int) -> dict[str, float]:
    """Return the fastest seconds of a row by the type of the cache; none for rows that its program cannot run."""
    ((before, tokens), *others) = row.sequences
    if others or (before and tokens > 1):
        return {}
    work = ["-p", str(tokens), "-n", "0"] if row.is_prompt else ["-p", "0", "-n", "0", "-gp", f"{before},32"]
    found = {}
    for cache in ("f16", "q8_0"):
        command = [str(program), "-m", str(path), "-t", str(threads), "-tgb", str(threads), "-fa", "1", "-rtr", "1"]
        command += ["-ctk", cache, "-ctv", cache, "-r", "2", "-w", "0", "-o", "json", *work]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (result,) = json.loads(done.stdout[done.stdout.index("[") :])
        per_token = 1e-9 * min(result["samples_ns"]) / (result["n_prompt"] if row.is_prompt else result["n_gen"])
        found[f"ik_llama.cpp, {cache} cache"] = per_token * (tokens if row.is_prompt else 1)
    return found


# --- the comparison


def compared(
    times: Mapping[str, npt.NDArray[np.float64]], ours: Sequence[str], fixed: Mapping[str, float]
) -> dict[str, Any]:
    """Return the median milliseconds of each, and how many times longer the best of the others takes than each of ours.

    times: (rounds,) seconds by name; ours: names of the native engines; fixed: seconds that were not measured in turns.
    """
    medians = {name: float(np.median(taken)) for name, taken in times.items()}
    others = {name: seconds for name, seconds in (medians | dict(fixed)).items() if name not in ours}
    found: dict[str, Any] = {"ms": {name: round(1e3 * value, 4) for name, value in (medians | dict(fixed)).items()}}
    if not others:
        return found
    for kind in ("llama.cpp", "ik_llama.cpp"):
        rivals = {name: seconds for name, seconds in others.items() if name.startswith(kind)}
        if not rivals:
            continue
        best = min(rivals, key=rivals.__getitem__)
        taken = times.get(best, np.array(rivals[best]))
        ratios = {name: float(np.median(taken / times[name])) for name in ours}
        found[f"times of {kind}"] = {"best": best, **{name: round(ratio, 3) for name, ratio in ratios.items()}}
    return found


def measure(part: Part, options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the part with one row more each time."""
    path = file_of(part, folder)
    contenders = contenders_of(part, options.llama, folder)
    ours = [contender.name for contender in contenders if contender.ours]
    clock = WALL if part.threads > 1 else CPU
    rows = []
    with opened(path, contenders) as benches:
        rate = memory_rate()
        found_part = {
            "clock": "passed" if clock == WALL else "CPU",
            "threads": part.threads,
            "builds": {name: bench.build for name, bench in benches.items()},
            "gigabytes_per_second": round(rate / 1e9, 1),
        }
        for row in part.rows:
            if options.row and row.name not in options.row:
                continue
            taking = [contender.name for contender in contenders if contender.takes(row)]
            for name in taking:
                benches[name].send("prepare", row)  # all at once, because a long prompt takes a minute
            for name in taking:
                benches[name].answer()
            with_ik = options.ik is not None and not part.avx2
            fixed = ik_seconds(options.ik, path, row, part.threads) if with_ik else {}
            calls = [functools.partial(benches[name].ask, "run", row) for name in taking]
            few = {"least": 3, "warmup": 1} if row.is_prompt else {"least": 7}  # a prompt takes seconds
            taken = in_turns(calls, seconds=options.seconds, most=200, **few)
            if fixed:
                again = ik_seconds(options.ik, path, row, part.threads)
                fixed = {name: min(value, again[name]) for name, value in fixed.items()}
            times = {name: taken[:, index, clock] for index, name in enumerate(taking)}
            found = {"row": row.name, "rounds": len(taken), **compared(times, ours, fixed)}
            read = {name: benches[name].ask("bytes_read", row) for name in ours}
            found["share of the memory bound"] = {
                name: round(count / rate / float(np.median(times[name])), 2) for name, count in read.items() if count
            }
            rows.append(found)
            print(json.dumps(found), flush=True)
            yield {**found_part, "rows": list(rows)}


def versions(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {**machine.describe(), "edgekit": __version__, "compiler": Compiler().version()}
    found["numpy"] = np.__version__
    if options.llama is not None:
        package = options.llama.parents[1] / "package.json"
        found["llama.cpp"] = json.loads(package.read_text())["version"] if package.exists() else "unknown"
        file = next(options.llama.glob("libggml-base.so"))
        version = ctypes.CDLL(str(file)).ggml_version
        version.restype = ctypes.c_char_p
        found["llama.cpp"] = f"npm {found['llama.cpp']}, ggml {version().decode()}"
    if options.ik is not None:
        found["ik_llama.cpp"] = options.ik_version
    root = Path(__file__).resolve().parents[1]
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    found["commit"] = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return found


def table(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown: our fastest cache beside the best of each of the others."""
    lines = []
    for name, part in report["parts"].items():
        lines += [f"**{name}** ({part['clock']} time, {part['threads']} thread{'s' * (part['threads'] > 1)})", ""]
        lines.append("| step | native f16, int8, int4, ms | llama.cpp, ms | ik_llama.cpp, ms | times | of the bound |")
        lines.append("|---|---|---|---|---|---|")
        for row in part["rows"]:
            ms = row["ms"]
            ours = [f"native {kv}" for kv in ("f16", "int8", "int4")]
            cells = [row["row"], ", ".join(milliseconds(ms[kv]) for kv in ours)]
            times = []
            for kind in ("llama.cpp", "ik_llama.cpp"):
                ratios = row.get(f"times of {kind}")
                cells.append(milliseconds(ms[ratios["best"]]) if ratios else "")
                if ratios:
                    times.append(max(ratios[kv] for kv in ours))
            shares = row["share of the memory bound"]
            cells.append(", ".join(f"{value:.2f}" for value in times))
            cells.append(", ".join(f"{shares[kv]:.0%}" for kv in ours if kv in shares))
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="folder with libllama.so and its parts")
    parser.add_argument("--ik", type=Path, help="ik_llama.cpp's llama-bench")
    parser.add_argument("--ik-version", default="unknown", help="of ik_llama.cpp, for the report")
    parser.add_argument("--row", action="append", help="only these rows")
    parser.add_argument("--part", action="append", help=f"one of: {'; '.join(part.name for part in PARTS)}")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each row")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for models that are made")
    parser.add_argument("--json", type=Path, help="write the numbers here; other rows that it has are kept")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print a report as Markdown, and measure nothing")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text())))
        return
    os.environ.pop("EDGEKIT_LLAMACPP", None)
    chosen = [part for part in PARTS if not options.part or part.name in options.part]
    report: dict[str, Any] = {"machine": versions(options), "parts": {}}
    if options.json and options.json.exists():
        stored = json.loads(options.json.read_text())
        report = {"machine": stored["machine"] | report["machine"], "parts": stored["parts"]}
    for part in chosen:
        print(f"--- {part.name}", flush=True)
        before = report["parts"].get(part.name, {}).get("rows", [])
        for measured in measure(part, options, options.folder):
            rows = {row["row"]: row for row in before + measured["rows"]}
            report["parts"][part.name] = {**measured, "rows": [rows[row.name] for row in part.rows if row.name in rows]}
            if options.json:  # after each row, because a part takes minutes
                options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))


if __name__ == "__main__":
    main()
