"""Run a study: propose, judge and keep networks, generation by generation and rung by rung (successive halving,
Jamieson and Talwalkar 2016, arXiv 1502.07943), in a folder that a later call continues.

    study.toml      the spec
    journal.jsonl   every decision and result
    latency.json    the operator table and its correction, if time matters
    weights/        of the networks of the last rung
    supernet.safetensors  the weights that all networks share, if there is a supernet
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
from edgekit.nas.outline import Outline, costs_of, outline
from edgekit.nas.proxies import SIZES, sizes
from edgekit.nas.space import key_of
from edgekit.nas.spec import Spec
from edgekit.nas.strategies import MOST_DRAWS, Tried, draw, propose, some
from edgekit.nas.supernet import NETWORKS, Gate, gate, trained
from edgekit.nn.hiera_config import HieraConfig, arguments
from edgekit.nn.training import Schedule

JOURNAL, SPEC, WEIGHTS, SUPERNET = "journal.jsonl", "study.toml", "weights", "supernet.safetensors"
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
        supernet = self.spec.score.supernet > 0
        if supernet:
            self._train_supernet()
        with _judges(processes, self.rows, self.spec) as judged:
            if supernet and self.gate is None:
                self._check_supernet(judged)
            for arm in self.spec.search.arms:
                self._explore(arm, judged)
            if self.rows is not None:
                for rung in range(1, len(self.spec.score.epochs)):
                    self._promote(rung, judged)

    @property
    def gate(self) -> Gate | None:
        """How far the supernet agrees with stand-alone training; None before that is known, and without a supernet."""
        checks = self._of("check")
        if not self.spec.score.supernet or len(checks) < self.spec.score.check:
            return None
        return gate([item["score"] for item in checks], [item["inherited"] for item in checks])

    def trials(self, arm: str) -> list[Event]:
        """Return the trials of an arm in their order."""
        return [item for item in self._of("trial") if item["arm"] == arm]

    def _of(self, event: str) -> list[Event]:
        return [item for item in self.journal.events if item["event"] == event]

    def rung(self, rung: int, arm: str) -> list[Event]:
        """Return the results of a later rung."""
        return [item for item in self._of("rung") if (item["rung"], item["arm"]) == (rung, arm)]

    def tried(self, arm: str) -> list[Tried]:
        """Return the trials as a strategy sees them."""
        return [
            Tried(tuple(item["choice"]), item["key"], item["score"], item[self.spec.search.cost])
            for item in self.trials(arm)
        ]

    def broken(self, config: HieraConfig) -> list[str]:
        """Return the limits that a network breaks."""
        found = outline(config, self.spec.limits.batch)
        over = self.spec.limits.broken(self._costs(found))
        if self.clock is not None and not self.clock.fits(found):
            over.append("memory of the device, or time at the largest known error of a prediction")
        return over

    def _train_supernet(self) -> None:
        """Train the supernet, unless its weights are there. They are those of an undisturbed run, or the study ends."""
        assert self.rows is not None
        known, path = self._of("supernet"), self.folder / SUPERNET
        if known and path.is_file() and _file_digest(path) == known[0]["weights"]:
            return
        score, space = self.spec.score, self.spec.space
        networks = some(space, draw(self.id, "supernet"), NETWORKS, MOST_DRAWS, self.broken)
        schedule = Schedule(score.supernet, batch=score.batch, learning_rate=score.learning_rate)
        checkpoint = self.folder / f"{SUPERNET}.checkpoint"
        with evaluate.prepared(self.rows, score):
            shared = trained(
                space, networks, self.rows.training, schedule, self._seed("supernet", 0), checkpoint, self._progress
            )
        write_file(path, save({name: value.numpy() for name, value in shared.items()}))
        if known and _file_digest(path) != known[0]["weights"]:
            raise EdgekitError(f"{path}: other weights than the study began with; begin it again in another folder")
        if not known:
            self.journal.append({"event": "supernet", "epochs": score.supernet, "weights": _file_digest(path)})
        checkpoint.unlink(missing_ok=True)

    def _check_supernet(self, judged: Judges) -> None:
        """Train random networks alone, and judge them by the supernet."""
        score = self.spec.score
        networks = some(self.spec.space, draw(self.id, "check"), score.check, MOST_DRAWS, self.broken)
        if len(networks) < score.check:
            raise EdgekitError(
                f"only {len(networks)} networks keep [limits], and a supernet is checked on {score.check}"
            )
        left = networks[len(self._of("check")) :]
        jobs = [
            job
            for config in left
            for job in (
                Job(arguments(config), self._seed(key_of(config), 0), score.epochs[0]),
                Job(arguments(config), 0, supernet=str(self.folder / SUPERNET)),
            )
        ]
        results = judged(jobs)
        for config in left:
            alone, inherited = next(results), next(results)
            self.journal.append(
                {"event": "check", "key": key_of(config), "score": alone.score, "inherited": inherited.score}
            )
            self._progress("training networks alone to check the supernet", len(self._of("check")), score.check)

    def _explore(self, arm: str, judged: Judges) -> None:
        """Try the arm's candidates; the networks of a generation depend on earlier generations alone."""
        search, space = self.spec.search, self.spec.space
        shared = str(self.folder / SUPERNET) if self.gate and self.gate.accepted else ""
        while (done := len(self.trials(arm))) < search.candidates:
            history = self.tried(arm)
            known = {item.key for item in history}
            end = min(search.candidates, (done // search.generation + 1) * search.generation)
            proposed = []
            for number in range(done, end):
                choice, config = propose(
                    arm, space, self.id, number, search.generation, history, known, self.broken
                )  # fmt: skip
                known.add(key_of(config))
                proposed.append((number, choice, config))
            jobs = [
                Job(
                    arguments(config),
                    self._seed(key_of(config), 0),
                    self._first_epochs,
                    proxies=self._proxies,
                    supernet=shared,
                )
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
        costs = costs_of(found)
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


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _digest(data: tuple[Dataset, Dataset]) -> str:
    found = hashlib.sha256()
    for part in data:
        for name, array in sorted({**part.inputs, "labels": part.labels}.items()):
            found.update(f"{name} {array.dtype} {array.shape}".encode())
            found.update(array.tobytes())
    return found.hexdigest()[:16]
