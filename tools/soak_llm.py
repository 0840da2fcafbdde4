"""Give a language model 200 random requests a minute for half an hour: memory must stay flat, and no block may be lost.

    python tools/soak_llm.py --minutes 30 --json benchmarks/llm_soak.json

Requests come at random times. Their prompts have 8 to 300 random tokens, and half of them begin as one of a few common
prompts; answers have 1 to 48 tokens, chosen greedily or at random, with and without drafts; one request in ten is
cancelled at a random moment. The cache is small, so that requests are preempted and resumed. The tool counts how each
request ends, and reads the process's resident memory every second. The memory is flat if its median in the last quarter
is at most 2 % above that in the second quarter. The exit status is 1 if it is not flat, if a request never ended, or if
a block is in use once all have ended.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgekit.importers import downloads
from runtimes.llm.blocks import blocks_for
from runtimes.llm.engine import Engine
from runtimes.llm.model import open_engine
from runtimes.llm.request import Request
from runtimes.llm.sampling import Sampling
from runtimes.llm.scheduler import Scheduler
from runtimes.llm.source import open_source

GROWTH = 0.02
PROMPTS, COMMON, ANSWERS = (8, 300), 4, (1, 48)  # tokens; prompts whose beginning others share; tokens
CANCELLED = 0.1


@dataclass
class Soak:
    """Requests on their way. ends: how they ended; tokens: of their answers."""

    engine: Engine
    rate: float  # requests a minute
    longest: int  # tokens of a prompt
    seed: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    submitted: int = 0

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(self.engine, budget=256)
        self.rng = np.random.default_rng(self.seed)
        self.common = [self._ids(self.longest) for _ in range(COMMON)]
        self.cancels: dict[int, float] = {}  # by request: seconds of the clock
        self.open: set[int] = set()

    def run(self, seconds: float, sample: float = 1.0) -> list[float]:
        """Run for these seconds, then until all requests have ended; return the resident MB, sampled on the way."""
        process, memory = psutil.Process(), []
        began = time.monotonic()
        next_request = next_sample = began
        while (now := time.monotonic()) < began + seconds or self.scheduler.busy:
            while next_request <= now < began + seconds:
                self._submit(now)
                next_request += float(self.rng.exponential(60.0 / self.rate))
            if next_sample <= now < began + seconds:
                memory.append(process.memory_info().rss / 2**20)
                next_sample += sample
            self._cancel(now)
            if self.scheduler.busy:
                self._step()
            else:
                time.sleep(max(0.0, min(next_request, next_sample) - now))
        return memory

    @property
    def lost_blocks(self) -> int:
        """How many blocks somebody holds, though no request is on its way."""
        return self.engine.blocks.number - self.engine.blocks.free

    def _submit(self, now: float) -> None:
        prompt = self._ids(int(self.rng.integers(PROMPTS[0], self.longest)))
        if self.rng.random() < 0.5:
            shared = int(self.rng.integers(1, len(prompt)))
            prompt[:shared] = self.common[int(self.rng.integers(COMMON))][:shared]
        sampling = Sampling(temperature=float(self.rng.choice([0.0, 1.0])), seed=int(self.rng.integers(1 << 30)))
        number = self.scheduler.submit(
            Request(
                prompt,
                int(self.rng.integers(*ANSWERS)),
                sampling,
                interactive=bool(self.rng.random() < 0.5),
                drafts=int(self.rng.choice([0, 4])),
            )
        )
        self.submitted += 1
        self.open.add(number)
        if self.rng.random() < CANCELLED:
            self.cancels[number] = now + float(self.rng.exponential(1.0))

    def _cancel(self, now: float) -> None:
        for number in [number for number, when in self.cancels.items() if when <= now]:
            del self.cancels[number]
            if self.scheduler.cancel(number):
                self.open.remove(number)
                self.ends["cancelled"] += 1

    def _step(self) -> None:
        for produced in self.scheduler.step():
            self.tokens += produced.token is not None
            if produced.finish is not None:
                self.open.remove(produced.request)
                self.cancels.pop(produced.request, None)
                self.ends[produced.finish] += 1

    def _ids(self, number: int) -> npt.NDArray[np.int64]:
        return self.rng.integers(0, self.engine.architecture.vocabulary, number)


def faults(soak: Soak, memory: list[float]) -> list[str]:
    """Return what is wrong after a run."""
    quarter = len(memory) // 4
    before, after = (float(np.median(part)) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
    found = []
    if after > (1 + GROWTH) * before:
        found.append(f"the memory has grown from {before:.0f} to {after:.0f} MB")
    if soak.open or soak.ends.total() != soak.submitted or soak.ends["failed"]:
        found.append(f"of {soak.submitted} requests, {dict(soak.ends)} have ended and {len(soak.open)} have not")
    if soak.lost_blocks:
        found.append(f"{soak.lost_blocks} blocks are in use, though no request is")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a minute")
    parser.add_argument("--kv", default="f16", help="how the cache stores keys and values")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the cache")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    from tools.bench_inference import describe_machine

    machine = describe_machine()
    model = open_source(downloads.find(options.model)).model
    engine = open_engine("native", model, {"blocks": blocks_for(options.context), "kv": options.kv})
    soak = Soak(engine, options.rate, PROMPTS[1])
    memory = soak.run(60 * options.minutes)
    report: dict[str, Any] = {
        "machine": machine,
        "model": options.model,
        "kv": options.kv,
        "context": options.context,
        "minutes": options.minutes,
        "requests": soak.submitted,
        "ends": dict(soak.ends),
        "tokens": soak.tokens,
        "preempted": soak.scheduler.preempted,
        "lost_blocks": soak.lost_blocks,
        "memory_mb": {
            f"quarter {number + 1}": round(float(np.median(part)), 1)
            for number, part in enumerate(np.array_split(np.array(memory), 4))
        },
        "faults": faults(soak, memory),
    }
    engine.close()
    print(json.dumps(report, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if report["faults"] else 0)


if __name__ == "__main__":
    main()
