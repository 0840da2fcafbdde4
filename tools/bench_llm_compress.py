"""Compare the methods that compress a language model, on held-out text and on one machine in one run.

    python tools/bench_llm_compress.py --json benchmarks/llm_compress.json

The source is SmolLM2 135M. Its only file on the package index has 4 bits, so the tool first writes the same weights in
float32; all divergences are from that model. It calibrates and measures on the texts that ship, without a budget, so
that no layer is rolled back; a last run has a budget, and shows what the guard does with it. The times are CPU seconds
of the whole job, measurement included. On a machine that others use, limit the threads: OMP_NUM_THREADS=1
OPENBLAS_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_inference import describe_machine

from edgekit.importers import downloads
from edgekit.importers.gguf import read_gguf
from edgekit.importers.gguf_write import write_gguf
from runtimes.llm.compression.guard import Budget
from runtimes.llm.compression.job import compress
from runtimes.llm.compression.result import Compressed
from runtimes.llm.compression.rounding import plain

SOURCE = "SmolLM2 135M Instruct, Q4_1 decoded to float32"
ANY = Budget(1e9, 1e9, 0.0)
RUNS: dict[str, tuple[dict[str, Any], Budget]] = {
    "Q4_0 nearest": ({"format": "Q4_0", "method": "nearest"}, ANY),
    "Q4_0 gptq": ({"format": "Q4_0", "method": "gptq"}, ANY),
    "Q4_0 awq": ({"format": "Q4_0", "method": "awq"}, ANY),
    "Q4_0 awq+gptq": ({"format": "Q4_0", "method": "awq+gptq"}, ANY),
    "Q8_0 nearest": ({"format": "Q8_0", "method": "nearest"}, ANY),
    "Q4_0 awq+gptq, 5 bits": ({"format": "Q4_0", "method": "awq+gptq", "bits": 5.0}, ANY),
    "Q4_0 awq+gptq, budget 0.1": ({"format": "Q4_0", "method": "awq+gptq"}, Budget(0.1, 1e9, 0.0)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="of calibration, and of measurement")
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="these runs")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    machine = describe_machine()
    print(*(f"{name} {value}" for name, value in machine.items()), sep=", ")
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        source = in_float32(Path(scratch))
        for name in options.only:
            settings, budget = RUNS[name]
            started = time.process_time()
            target = Path(scratch) / "small.gguf"
            result = compress(source, target, budget=budget, force=True, tokens=options.tokens, **settings)
            rows[name] = row(result, time.process_time() - started)
            print(f"{name:28}", *(f"{key} {value}" for key, value in rows[name].items()), flush=True)
            found = {
                "machine": machine,
                "source": SOURCE,
                "texts": result.texts,
                "tokens": options.tokens,
                "runs": rows,
            }
            if options.json is not None:  # after each run, because a run takes minutes
                options.json.write_text(json.dumps(found, indent=1) + "\n")


def in_float32(folder: Path) -> Path:
    """Write the model's weights in float32."""
    file, path = read_gguf(downloads.get("smollm2")), folder / "source.gguf"
    tensors = [plain(tensor.name, tensor.values()) for tensor in file.tensors.values()]
    write_gguf(path, {**file.raw, "general.file_type": 0}, tensors)
    return path


def row(result: Compressed, seconds: float) -> dict[str, Any]:
    quality = result.quality
    measured = {
        name: {part: round(getattr(getattr(quality, name), part), 5) for part in ("value", "low", "high", "samples")}
        for name in ("divergence", "perplexity", "agreement")
    }
    return measured | {
        "bytes": result.bytes,
        "bits": round(result.bits, 3),
        "rolled_back": sum(layer.reason.startswith("rolled back") for layer in result.layers),
        "eight_bits": sum("Q8_0" in layer.formats for layer in result.layers),
        "cpu_seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
