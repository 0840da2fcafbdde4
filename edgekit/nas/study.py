"""Run a study: propose, judge and keep networks, generation by generation and rung by rung (successive halving,
Jamieson and Talwalkar 2016, arXiv 1502.07943), in a folder that a later call continues.

    study.toml      the spec
    journal.jsonl   every decision and result
    latency.json    the operator table and its correction, if time matters
    weights/        of the networks of the last rung
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from edgekit.bundle.files import write_file
from edgekit.data.dataset import Dataset, load
from edgekit.errors import EdgekitError
from edgekit.nas import evaluate
from edgekit.nas.bundles import manifest_of
from edgekit.nas.clock import Progress, open_clock
from edgekit.nas.evaluate import Job, Judged, Rows
from edgekit.nas.journal import Journal
from edgekit.nas.outline import Outline, outline
from edgekit.nas.proxies import SIZES, sizes
from edgekit.nas.space import key_of
from edgekit.nas.spec import Spec
from edgekit.nas.strategies import Tried, draw, propose
from edgekit.nn.hiera_config import HieraConfig, arguments

JOURNAL, SPEC, WEIGHTS = "journal.jsonl", "study.toml", "weights"
Event = dict[str, Any]


class Study:
    """A study in its folder. Close it after use."""

    def __init__(self, spec: Spec, folder: Path, progress: Progress = lambda what, done, total: None) -> None:
        self.spec, self.folder, self._progress = spec, folder, progress
        folder.mkdir(parents=True, exist_ok=True)
        self.clock = open_clock(spec, folder, progress) if spec.timed else None
        data = _rows_of(spec) if spec.score.data else None
        digest = _digest(data) if data else ""
        self.id = spec.study(digest, self.clock.digest if self.clock else "")
        self.rows = evaluate.split(*data, spec.score.validation, self.id) if data else None
        self.journal = Journal(folder / JOURNAL)
        begun = self.journal.events[0] if self.journal.events else None
        if begun is None:
            self.journal.append({"event": "study", "id": self.id, "spec": spec.as_json(), "data": digest})
        elif begun.get("id") != self.id:
            self.journal.close()
            raise EdgekitError(
                f"{folder} holds study {begun.get('id')}, and this is study {self.id}: its spec, its data or this "
                "machine's operator table differ; use another folder for a new study"
            )

    def close(self) -> None:
        self.journal.close()

    def run(self, processes: int = 2) -> None:
        """Run what is left. processes: networks that are judged at the same time; the result does not depend on it."""
        with _judges(processes, self.rows, self.spec) as judged:
            for arm in self.spec.search.arms:
                self._explore(arm, judged)
            if self.rows is not None:
                for rung in range(1, len(self.spec.score.epochs)):
                    self._promote(rung, judged)

    def trials(self, arm: str) -> list[Event]:
        """Return the trials of an arm in their order."""
        return [item for item in self.journal.events if item["event"] == "trial" and item["arm"] == arm]

    def rung(self, rung: int, arm: str) -> list[Event]:
        """Return the results of a later rung."""
        return [
            item
            for item in self.journal.events
            if item["event"] == "rung" and (item["rung"], item["arm"]) == (rung, arm)
        ]

    def tried(self, arm: str) -> list[Tried]:
        """Return the trials as a strategy sees them."""
        return [
            Tried(tuple(item["choice"]), item["key"], item["score"], item[self.spec.search.cost])
            for item in self.trials(arm)
        ]

    def allowed(self, config: HieraConfig) -> bool:
        """Return whether a network keeps the limits."""
        found = outline(config, self.spec.limits.batch)
        limits = asdict(self.spec.limits)
        within = all(limits[name] is None or value <= limits[name] for name, value in self._costs(found).items())
        return within and (self.clock is None or self.clock.fits(found))

    def _explore(self, arm: str, judged: Judges) -> None:
        """Try the arm's candidates; the networks of a generation depend on earlier generations alone."""
        search, space = self.spec.search, self.spec.space
        while (done := len(self.trials(arm))) < search.candidates:
            history = self.tried(arm)
            known = {item.key for item in history}
            end = min(search.candidates, (done // search.generation + 1) * search.generation)
            proposed = []
            for number in range(done, end):
                choice, config = propose(
                    arm, space, self.id, number, search.generation, history, known, self.allowed
                )  # fmt: skip
                known.add(key_of(config))
                proposed.append((number, choice, config))
            jobs = [
                Job(arguments(config), self._seed(key_of(config), 0), self._first_epochs, proxies=self._proxies)
                for _, _, config in proposed
            ]
            for (number, choice, config), result in zip(proposed, judged(jobs), strict=True):
                costs = self._costs(outline(config, self.spec.limits.batch))
                scores = {**sizes(round(costs["parameters"]), round(costs["macs"])), **result.proxies}
                score = scores[self.spec.score.proxy] if result.score is None else result.score
                self.journal.append(
                    {
                        "event": "trial", "arm": arm, "number": number, "choice": list(choice), "key": key_of(config),
                        "arguments": arguments(config), **costs, "proxies": scores, "score": score,
                    }
                )  # fmt: skip
                self._progress(f"trying networks ({arm})", number + 1, search.candidates)

    def _promote(self, rung: int, judged: Judges) -> None:
        """Train the best networks of each arm longer."""
        score = self.spec.score
        last = rung == len(score.epochs) - 1
        wanted: list[tuple[str, Event, int]] = []
        for arm in self.spec.search.arms:
            done = {(item["key"], item["seed"]) for item in self.rung(rung, arm)}
            for event in self._best(rung, arm):
                for seed in range(score.seeds if last else 1):
                    if (event["key"], seed) not in done:
                        wanted.append((arm, event, seed))
        jobs = [
            Job(event["arguments"], self._seed(event["key"], seed), score.epochs[rung], last=last)
            for _, event, seed in wanted
        ]
        for place, ((arm, event, seed), result) in enumerate(zip(wanted, judged(jobs), strict=True)):
            if result.weights is not None:
                write_file(self.folder / WEIGHTS / f"{event['key']}-{seed}.safetensors", save(dict(result.weights)))
            kept = {name: event[name] for name in ("number", "key", "arguments", "parameters", "macs", "activations")}
            kept |= {"milliseconds": event["milliseconds"]} if "milliseconds" in event else {}
            self.journal.append(
                {"event": "rung", "rung": rung, "arm": arm, "seed": seed, "score": result.score, **kept}
            )
            self._progress(f"training the best networks for {score.epochs[rung]} epochs", place + 1, len(wanted))

    def _best(self, rung: int, arm: str) -> list[Event]:
        before = self.trials(arm) if rung == 1 else self.rung(rung - 1, arm)
        return sorted(before, key=lambda item: (-item["score"], item["key"]))[: self.spec.score.keep[rung - 1]]

    @property
    def _first_epochs(self) -> int:
        return self.spec.score.epochs[0] if self.rows is not None else 0

    @property
    def _proxies(self) -> bool:
        """Whether networks are built for their proxies: a size needs none, and nothing is to be compared with it."""
        return self.rows is not None or self.spec.score.proxy not in SIZES

    def _seed(self, key: str, seed: int) -> int:
        return int(draw(self.id, "seed", key, seed).integers(2**31))

    def _costs(self, found: Outline) -> dict[str, float]:
        costs: dict[str, float] = {
            "parameters": found.parameters, "macs": found.macs, "activations": found.activations,
        }  # fmt: skip
        return costs if self.clock is None else {**costs, "milliseconds": self.clock.milliseconds(found)}


Judges = Callable[[Sequence[Job]], Iterator[Judged]]


@contextmanager
def _judges(processes: int, rows: Rows | None, spec: Spec) -> Iterator[Judges]:
    """Provide a function that judges networks and yields the results in order: in this process, or in several child
    processes."""
    if processes == 1:
        with evaluate.prepared(rows, spec.score):
            yield lambda jobs: map(evaluate.judge, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, evaluate.prepare, (rows, spec.score))
    try:
        yield lambda jobs: pool.map(evaluate.judge, jobs)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()


def _rows_of(spec: Spec) -> tuple[Dataset, Dataset]:
    training, test = load(spec.score.data, manifest_of(spec.space))
    for part in (training, test):
        if part.labels.dtype.kind != "i" or part.labels.max(initial=0) >= spec.space.classes:
            raise EdgekitError(
                f"{spec.score.data}: labels must be whole numbers from 0 to {spec.space.classes - 1}, the classes of "
                "[space]"
            )
    return training, test


def _digest(data: tuple[Dataset, Dataset]) -> str:
    found = hashlib.sha256()
    for part in data:
        for name, array in sorted({**part.inputs, "labels": part.labels}.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:16]
