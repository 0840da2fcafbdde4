"""Simulate a device that cannot be taken from a step, with alerts at a fixed objective beside a language model.

    python tools/simulate_device.py --json benchmarks/simulate_device.json
    python tools/simulate_device.py --clock measured

The steps are really executed: SmolLM2-135M on the native engine with one thread, and t2 on batches of the alerts that
have come. Only the clock is simulated: it moves by the cost of each layer and of each batch. By default the costs are
those of a law that is fitted to steps measured on this machine before, with errors drawn from the measured ones, so
that the same costs give the same numbers on every machine. With `--clock measured` the clock moves by the CPU time that
each layer takes. Alerts come at random moments (Poisson), 256 a second; an alert whose class is known later than 50 ms
after it came is a miss. Prompts of 1,500 tokens come one after the other, beside three streams of chat.

Each policy runs at constant speed and on a device that becomes half as fast in the middle. The policies are fixed
budgets of tokens, the adaptive budget (for engines that run a step as a whole), pauses between layers, and `edgekit
serve`: pauses, and a budget for the time between two tokens of a chat. Nothing here runs on a GPU; see
tools/bench_corun_gpu.py for that.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgekit import machine
from edgekit.bundle.tensors import golden_inputs
from edgekit.importers import downloads
from edgekit.importers.api import open_model
from edgekit.importers.gguf import read_gguf
from edgekit.session import NextStep, Session, open_session
from runtimes.daemon.arbiter import Arbiter
from runtimes.daemon.language_job import LanguageJob
from runtimes.daemon.session_job import SessionJob
from runtimes.daemon.step_time import shape_of
from runtimes.llm.architecture import Model, from_gguf
from runtimes.llm.engine import Batch, Item
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.request import Produced, Request, StepShape

OBJECTIVE, RATE = 0.05, 256.0  # seconds for an alert, alerts a second
CHATS, CHAT_PROMPT, CHAT_ANSWER = 3, 48, 100
LONG_PROMPT, LONG_ANSWER = 1500, 32
POLICIES = ("512", "128", "64", "48", "32", "24", "20", "16", "adaptive", "layers", "serve")
FAST, SLOW = "constant", "half as fast from the middle"


@dataclass(frozen=True)
class Costs:
    """Seconds of a step: base + token * tokens + pair * pairs + sequence * sequences + row * rows of logits; of a batch
    of alerts: batch + alert * alerts. errors: quantiles of measured over predicted seconds of steps."""

    base: float
    token: float
    pair: float
    sequence: float
    row: float
    batch: float
    alert: float
    errors: tuple[float, ...]

    def layers(self, shape: StepShape) -> float:
        return self.base + self.token * shape.tokens + self.pair * shape.pairs + self.sequence * shape.sequences


class Device:
    """The clock, and how many times slower than at the start the device is from a moment on."""

    def __init__(self, costs: Costs | None, slow_from: float, seed: int = 0) -> None:
        self.costs, self.slow_from, self.now = costs, slow_from, 0.0
        self._rng = np.random.default_rng(seed)

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds * (2.0 if self.now >= self.slow_from else 1.0)

    def error(self) -> float:
        """Return how many times its predicted seconds the next step takes."""
        assert self.costs is not None
        at = self._rng.random() * (len(self.costs.errors) - 1)
        return float(np.interp(at, np.arange(len(self.costs.errors)), self.costs.errors))


class DeviceEngine(NativeEngine):
    """The native engine, whose layers move the device's clock."""

    device: Device

    def begin(self, batch: Batch) -> Any:
        self._factor = self.device.error() if self.device.costs else 1.0
        return super().begin(batch)

    def run_layers(self, state: Any, batch: Batch, first: int, end: int) -> None:
        for number in range(first, end):  # one by one in every policy, so that the slowdown begins at the same moment
            started = time.thread_time()
            super().run_layers(state, batch, number, number + 1)
            costs, layers = self.device.costs, self.architecture.layers
            measured = time.thread_time() - started
            self.device.pass_(measured if costs is None else self._factor * costs.layers(shape_in(batch)) / layers)

    def finish(self, state: Any, batch: Batch) -> npt.NDArray[np.float32]:
        started = time.thread_time()
        logits = super().finish(state, batch)
        costs = self.device.costs
        measured = time.thread_time() - started
        self.device.pass_(measured if costs is None else self._factor * costs.row * len(batch.wanted))
        return logits


class WholeEngine(DeviceEngine):
    """The same, as an engine that cannot stop between layers."""

    divisible = False


def shape_in(batch: Batch) -> StepShape:
    return StepShape(len(batch.ids), int(batch.index.sum()) + len(batch.ids), len(batch.spans))


class Alerts(SessionJob):
    """Alerts that come at known moments."""

    def __init__(self, session: Session, device: Device, moments: Sequence[float]) -> None:
        super().__init__("alerts", session, seconds=OBJECTIVE, clock=device)
        self._device, self._moments, self._next = device, moments, 0
        self._row = {name: array[:1] for name, array in golden_inputs(tuple(session.inputs), 1).items()}
        self.latencies: list[float] = []

    def next_step(self, *, batch: bool) -> NextStep | None:
        self._come()
        return super().next_step(batch=batch)

    def slack(self) -> float:
        self._come()
        return super().slack()

    def run(self, between: Any) -> None:
        if self._device.costs is None:
            started = time.thread_time()
            super().run(between)
            self._device.pass_(time.thread_time() - started)
            return
        super().run(between)

    def _come(self) -> None:
        while self._next < len(self._moments) and self._moments[self._next] <= self._device.now:
            moment = self._moments[self._next]
            self._next += 1
            self.submit(self._row, lambda _, moment=moment: self._done(moment), moment + OBJECTIVE)

    def _done(self, moment: float) -> None:
        self.latencies.append(self._device.now - moment)


class TimedSession:
    """A session whose batches move the clock before their results are there."""

    def __init__(self, session: Session, device: Device) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.device, self.provider = session.device, session.provider
        self._session, self._clock = session, device

    def run(self, arrays: Any) -> Any:
        started = time.thread_time()
        found = self._session.run(arrays)
        costs, rows = self._clock.costs, len(next(iter(arrays.values())))
        measured = time.thread_time() - started
        self._clock.pass_(measured if costs is None else costs.batch + costs.alert * rows)
        return found

    def warmup(self, batch: int) -> None:
        self._session.warmup(batch)


class Talkers:
    """Clients of the language model: each asks again when it has its answer."""

    def __init__(self, device: Device, vocabulary: int, long_prompt: int, seed: int = 1) -> None:
        self._device, self._vocabulary, self._long = device, vocabulary, long_prompt
        self._rng = np.random.default_rng(seed)
        self._asked: dict[int, tuple[bool, float]] = {}  # by request: whether it is a chat, and when it was asked
        self._last: dict[int, float] = {}
        self.prompt_tokens = self.tokens = 0
        self.between: list[float] = []
        self.first: list[float] = []  # of long prompts

    def ask(self, job: LanguageJob, chat: bool) -> None:
        length, most = (CHAT_PROMPT, CHAT_ANSWER) if chat else (self._long, LONG_ANSWER)
        prompt = self._rng.integers(0, self._vocabulary, length)
        number = job.scheduler.submit(Request(prompt, most, drafts=0))
        self._asked[number] = (chat, self._device.now)

    def take(self, job: LanguageJob, produced: Sequence[Produced]) -> None:
        for item in produced:
            chat, asked = self._asked[item.request]
            if item.token is not None:
                self.tokens += 1
                if item.request in self._last:
                    if chat:
                        self.between.append(self._device.now - self._last[item.request])
                elif not chat:
                    self.first.append(self._device.now - asked)
                self._last[item.request] = self._device.now
            if item.finish is not None:
                self.prompt_tokens += CHAT_PROMPT if chat else self._long
                del self._asked[item.request], self._last[item.request]
                self.ask(job, chat)


def simulate(
    model: Model, session: Session, policy: str, *, costs: Costs | None, seconds: float, slow: bool, long_prompt: int
) -> dict[str, Any]:
    """Return what one policy gave in some virtual seconds."""
    device = Device(costs, seconds / 2 if slow else math.inf)
    rng = np.random.default_rng(2)
    moments = np.cumsum(rng.exponential(1 / RATE, round(1.2 * seconds * RATE))).tolist()
    pauses = policy in ("layers", "serve")
    with closing((DeviceEngine if pauses else WholeEngine)(model, blocks=400, threads=1)) as engine:
        engine.device = device
        arbiter = Arbiter(clock=device, most_wait=1e9)
        alerts = Alerts(TimedSession(session, device), device, [at for at in moments if at < seconds])
        talkers = Talkers(device, model.architecture.vocabulary, long_prompt)
        job = LanguageJob(
            "language",
            engine,
            deliver=lambda produced: talkers.take(job, produced),
            between_tokens=0.05 if policy == "serve" else None,
            budget=int(policy) if policy.isdigit() else 512,
            slack=(lambda: math.inf) if policy.isdigit() else arbiter.slack,
            clock=device,
        )
        arbiter.add(alerts)
        arbiter.add(job)
        for number in range(CHATS + 1):
            talkers.ask(job, number < CHATS)
        began, computed = time.perf_counter(), 0
        while device.now < seconds:
            arbiter.step()
        computed = sum(engine.length(number) for number in talkers._asked)
        ended = device.now
    return {
        "policy": policy,
        "speed": SLOW if slow else FAST,
        "alerts": len(alerts.latencies),
        "missed": float(np.mean([value > OBJECTIVE for value in alerts.latencies])),
        "alert_ms": _milliseconds(alerts.latencies, (50, 99, 99.9, 100)),
        "generated_per_s": talkers.tokens / ended,
        "tokens_per_s": (talkers.tokens + talkers.prompt_tokens + computed) / ended,
        "between_tokens_ms": _milliseconds(talkers.between, (50, 99, 100)),
        "long_first_token_s": float(np.median(talkers.first)) if talkers.first else None,
        "longest_step_ms": 1e3 * arbiter.served["language"].longest,
        "real_seconds": round(time.perf_counter() - began, 1),
    }


def _milliseconds(values: Sequence[float], quantiles: Sequence[float]) -> dict[str, float]:
    return {f"p{quantile:g}": round(1e3 * float(np.percentile(values, quantile)), 2) for quantile in quantiles}


# --- costs


def measured_costs(model: Model, session: Session, steps: int = 160, seed: int = 3) -> Costs:
    """Fit the law of costs to steps and batches, by the CPU time of one thread."""
    rng, vocabulary = np.random.default_rng(seed), model.architecture.vocabulary
    rows, seconds = [], []
    with closing(NativeEngine(model, blocks=600, threads=1)) as engine:
        bases = (1000, 700, 400, 200, 60)  # sequences that are there, of these lengths
        for at, length in enumerate(bases):
            for start in range(0, length, 500):
                engine.step([Item(at, rng.integers(0, vocabulary, min(500, length - start)), logits="none")])
        for number in range(steps + 10):
            answers = rng.choice(5, rng.integers(0, 5), replace=False).tolist()
            chunk = int(rng.choice([0, 8, 16, 32, 64, 128, 256, 500]))
            items = [Item(at, rng.integers(0, vocabulary, 1)) for at in answers]
            before = int(rng.integers(1, 1000))
            if chunk or not answers:
                engine.fork(0, 9)
                engine.truncate(9, before)
                items.append(Item(9, rng.integers(0, vocabulary, max(1, chunk)), logits="none"))
            started = time.thread_time()
            engine.step(items)
            taken = time.thread_time() - started
            shape = shape_of(sum(len(item.inputs) for item in items), [bases[at] for at in answers], before)
            if number >= 10:  # the first ones find cold pages
                rows.append([1, shape.tokens, shape.pairs, shape.sequences, len(answers)])
                seconds.append(taken)
            for at in answers:
                engine.truncate(at, bases[at])
            if 9 in engine.blocks.tables:
                engine.remove(9)
    law, ratios = _fitted(np.array(rows, float), np.array(seconds))
    batches = np.array([1, 2, 4, 8, 16, 32] * 12)
    taken_by = [_batch_seconds(session, int(size)) for size in batches]
    batch, _ = _fitted(np.stack([np.ones(len(batches)), batches], 1), np.array(taken_by))
    errors = np.quantile(ratios, np.linspace(0, 1, 41))
    return Costs(*law, *batch, tuple(float(f"{value:.4g}") for value in errors))


def _fitted(rows: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> tuple[list[float], Any]:
    """Return numbers of at least 0 that fit the relative errors of seconds, and measured over predicted seconds."""
    from scipy.optimize import nnls

    scale = 1 / seconds
    law, _ = nnls(rows * scale[:, None], np.ones(len(seconds)))
    return [float(f"{value:.6g}") for value in law], seconds / (rows @ law)


def _batch_seconds(session: Session, size: int) -> float:
    arrays = golden_inputs(tuple(session.inputs), size)
    started = time.thread_time()
    session.run(arrays)
    return time.thread_time() - started


def describe(row: dict[str, Any]) -> str:
    alert, between = row["alert_ms"], row["between_tokens_ms"]
    return (
        f"{row['policy']:9s} {row['speed'][:8]:9s} missed {row['missed']:7.2%}  alerts p50 {alert['p50']:6.1f} p99 "
        f"{alert['p99']:6.1f} max {alert['p100']:6.1f} ms  tokens/s {row['tokens_per_s']:6.0f} generated "
        f"{row['generated_per_s']:5.0f}  between tokens p99 {between['p99']:6.1f} max {between['p100']:6.1f} ms  "
        f"long prompt {row['long_first_token_s'] or math.nan:5.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=POLICIES, help=f"[default: {' '.join(POLICIES)}]")
    parser.add_argument("--seconds", type=float, default=12.0, help="virtual, of each row")
    parser.add_argument("--clock", choices=("costs", "measured"), default="costs")
    parser.add_argument("--measure", action="store_true", help="fit the costs here, instead of the stored ones")
    parser.add_argument("--json", type=Path, help="write the numbers here, and take the stored costs from here")
    options = parser.parse_args()
    model = from_gguf(read_gguf(downloads.find("smollm2")))
    session = open_session(open_model(Path(__file__).resolve().parents[1] / "models" / "t2-gr"), "auto", threads=1)
    stored = json.loads(options.json.read_text()) if options.json and options.json.is_file() else {}
    costs = None
    if options.clock == "costs":
        if options.measure or "costs" not in stored:
            costs = measured_costs(model, session)
            stored = {"machine": machine.describe(), "costs": asdict(costs), "rows": []}
        else:
            costs = Costs(**{**stored["costs"], "errors": tuple(stored["costs"]["errors"])})
        print({name: value for name, value in asdict(costs).items() if name != "errors"}, "errors", costs.errors[::10])
    rows = [row for row in stored.get("rows", []) if row["policy"] not in options.policies]
    for policy in options.policies:
        for slow in (False, True):
            row = simulate(
                model, session, policy, costs=costs, seconds=options.seconds, slow=slow, long_prompt=LONG_PROMPT
            )
            rows.append(row)
            print(describe(row), flush=True)
    if options.json:
        stored |= {"machine": stored.get("machine", machine.describe()), "clock": options.clock, "rows": rows}
        options.json.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
