"""Measure real-time batches beside a language model on one GPU, for each mechanism; for the day when there is a card.

    python tools/bench_corun_gpu.py --seconds 20 --json corun_gpu.json

It needs PyTorch with CUDA and nothing else: no broker, no packets. SmolLM2-135M runs on the torch engine, t2 as a torch
module; batches of 1 to 32 alerts come at random moments (Poisson), 256 alerts a second, and an alert that is classified
later than 50 ms after it came is a miss. Rows: `alone`; `streams`: two threads and two CUDA streams of equal priority;
`high priority`: the alerts' stream has the highest one; `layers`: the arbiter, which lets alerts run between layers;
`adaptive`: the arbiter, whole steps that fit into the slack; and fixed budgets of whole steps. The times are the wall
clock's. Nobody has run this on a GPU yet: on a machine without one it stops with an error.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgekit import machine
from edgekit.bundle.tensors import golden_inputs
from edgekit.errors import EdgekitError
from edgekit.importers import downloads
from edgekit.importers.api import open_model
from edgekit.importers.gguf import read_gguf
from edgekit.session import Session, open_session
from runtimes.daemon.arbiter import Arbiter
from runtimes.daemon.language_job import LanguageJob
from runtimes.daemon.session_job import SessionJob
from runtimes.llm.architecture import from_gguf
from runtimes.llm.request import Produced, Request
from runtimes.llm.torch_engine import TorchEngine

OBJECTIVE, RATE = 0.05, 256.0
ROWS = ("alone", "streams", "high priority", "layers", "adaptive", "512", "128", "32")


class WholeTorchEngine(TorchEngine):
    divisible = False


class OnStream:
    """A session whose runs are on a CUDA stream of their own, and end before `run` returns."""

    def __init__(self, session: Session, priority: int) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.device, self.provider = session.device, session.provider
        self._session, self._stream = session, torch.cuda.Stream(priority=priority)

    def run(self, arrays: Any) -> Any:
        with torch.cuda.stream(self._stream):
            found = self._session.run(arrays)
        self._stream.synchronize()
        return found

    def warmup(self, batch: int) -> None:
        self._session.warmup(batch)


def measure(row: str, engine: TorchEngine | None, session: Session, seconds: float) -> dict[str, Any]:
    """Run the alerts and, except alone, the language model for some seconds."""
    together = row in ("layers", "adaptive") or row.isdigit()
    arbiters = {"alerts": Arbiter()}
    arbiters["language"] = arbiters["alerts"] if together else Arbiter()
    stream = OnStream(session, -5 if row == "high priority" else 0) if row in ("streams", "high priority") else session
    alerts = SessionJob("alerts", stream, seconds=OBJECTIVE, wake=arbiters["alerts"].wake)
    arbiters["alerts"].add(alerts)
    counts = {"tokens": 0}
    if engine is not None:
        arbiters["language"].add(language_job(row, engine, arbiters["language"], counts))
    stop, latencies = threading.Event(), []
    threads = [threading.Thread(target=item.run, args=(stop.is_set,)) for item in set(arbiters.values())]
    for thread in threads:
        thread.start()
    rng, row_input = np.random.default_rng(2), golden_inputs(tuple(session.inputs), 1)
    start = due = time.monotonic()
    while due < start + seconds:
        due += rng.exponential(1 / RATE)
        time.sleep(max(0.0, due - time.monotonic()))
        alerts.submit(row_input, lambda _, came=due: latencies.append(time.monotonic() - came), due + OBJECTIVE)
    stop.set()
    for item in arbiters.values():
        item.wake()
    for thread in threads:
        thread.join()
    return {
        "row": row,
        "alert_ms": {f"p{q:g}": 1e3 * float(np.percentile(latencies, q)) for q in (50, 99, 99.9, 100)},
        "missed": float(np.mean([value > OBJECTIVE for value in latencies])),
        "tokens_per_s": counts["tokens"] / seconds,
    }


def language_job(row: str, engine: TorchEngine, arbiter: Arbiter, counts: dict[str, int]) -> LanguageJob:
    rng, prompts = np.random.default_rng(0), {}

    def ask(length: int, most: int) -> None:
        ids = rng.integers(0, engine.architecture.vocabulary, length)
        prompts[job.scheduler.submit(Request(ids, most, drafts=0))] = (length, most)

    def deliver(produced: Any) -> None:
        item: Produced
        for item in produced:
            counts["tokens"] += item.token is not None
            if item.finish is not None:
                length, most = prompts.pop(item.request)
                counts["tokens"] += length
                ask(length, most)

    slack: Callable[[], float] = (lambda: math.inf) if row.isdigit() else arbiter.slack
    budget = int(row) if row.isdigit() else 512
    job = LanguageJob("language", engine, deliver=deliver, between_tokens=None, budget=budget, slack=slack)
    for _ in range(3):
        ask(48, 100)
    ask(1500, 32)
    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=ROWS, help=f"[default: {' '.join(ROWS)}]")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each row")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise EdgekitError("no GPU is visible to PyTorch; this benchmark needs one, see tools/simulate_device.py")
    model = from_gguf(read_gguf(downloads.find("smollm2")))
    bundle = open_model(Path(__file__).resolve().parents[1] / "models" / "t2-gr")
    session = open_session(bundle, "torch", device="cuda")
    rows = []
    for row in options.rows:
        whole = row == "adaptive" or row.isdigit()
        if row == "alone":
            rows.append(measure(row, None, session, options.seconds))
        else:
            with closing((WholeTorchEngine if whole else TorchEngine)(model, blocks=400, device="cuda")) as engine:
                rows.append(measure(row, engine, session, options.seconds))
        print(rows[-1], flush=True)
    if options.json:
        found = {"machine": machine.describe() | {"gpu": torch.cuda.get_device_name()}, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
