"""Train scaled versions of published networks beside the finalists of a study, by the procedure of its last rung.

    python tools/make_animal_mnist.py -o animals.npz
    edgekit search run tools/animals.toml -o study
    python tools/bench_animals.py study --peers FOLDER --json animals.json

A peer is the widest version of a published network that keeps the study's limit of multiply-accumulates. It has two
variants: with the strides that were published, and with a first convolution that keeps the side of these small images.
The first rung decides between the two, on the rows that the study chooses by; then the peer learns from the same rows,
for the same epochs and with as many seeds as the finalists, and the same test rows judge it. Results are kept in the
JSON file after each training, so a run that was stopped goes on. It takes some hours on one core.

One training of a finalist is repeated here and must give the study's result to the last digit.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer_networks import FAMILIES, macs, scaled, use
from torch import nn

from edgekit import machine
from edgekit.data.dataset import Dataset, load
from edgekit.errors import EdgekitError
from edgekit.nas import evaluate
from edgekit.nas.bundles import manifest_of
from edgekit.nas.evaluate import Rows
from edgekit.nas.result import Noise, noise_of, verdict
from edgekit.nas.spec import Spec, read_spec
from edgekit.nas.strategies import draw
from edgekit.nn import hiera
from edgekit.nn.hiera_config import HieraConfig
from edgekit.nn.training import Schedule, accuracy, fit

HIERA = "Hiera"  # it has one variant: its own first convolution goes to a quarter of the side
WORSE = {"worse": "below", "better": "above, beyond the noise", "not distinguishable": "not below beyond the noise"}


@dataclass(frozen=True, slots=True)
class Trained:
    """A network of the last rung: a score on the test rows for each seed."""

    name: str
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.scores))


def judged(model: nn.Module, spec: Spec, epochs: int, seed: int, training: Dataset, judging: Dataset) -> float:
    """Train a network as a rung does, and return the share of the judging rows that are right."""
    schedule = Schedule(epochs, batch=spec.score.batch, learning_rate=spec.score.learning_rate)
    try:
        trained = fit(model, training, schedule, seed=seed)
    except EdgekitError:  # it diverged
        return 0.0
    return accuracy(trained, judging)


def builder(family: str, spec: Spec, *, late: bool) -> Callable[[], nn.Module] | None:
    """Return what builds the scaled network of a family, None if none keeps the limit."""
    space, most = spec.space, spec.limits.macs or math.inf
    if family != HIERA:
        return scaled(family, space.image, space.classes, most, late=late)
    for width in range(256, 0, -4):  # Tiny: table 7 of the paper
        config = HieraConfig(
            (1, 2, 7, 2), ("window", "window", "global", "global"), (4,) * 4, (True,) * 3, width, width,
            space.image // 4, image=space.image, channels=1, classes=space.classes,
        )  # fmt: skip
        if macs(hiera.Hiera(config), (1, space.image, space.image)) <= most:
            return functools.partial(hiera.Hiera, config)
    return None


class Bench:
    """The trainings of a study's peers, kept in a JSON file."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.path = path
        lines = [json.loads(line) for line in (folder / "journal.jsonl").read_bytes().splitlines(keepends=False)]
        self.id, self.spec = lines[0]["id"], read_spec(folder / "study.toml")
        self.events = [item for item in lines if item["event"] == "rung"]
        self.rows: Rows = evaluate.split(
            *load(self.spec.score.data, manifest_of(self.spec.space)), self.spec.score.validation, self.id
        )
        self.all_training = evaluate.joined(self.rows.training, self.rows.choosing)
        self.content: dict[str, Any] = {"study": self.id, "peers": {}}
        if path.is_file():
            self.content = json.loads(path.read_bytes())
            if self.content["study"] != self.id:
                raise SystemExit(f"{path} holds the peers of study {self.content['study']}, and this is {self.id}")

    def write(self, **more: Any) -> None:
        self.content |= more
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def seed(self, name: str, number: int) -> int:
        return int(draw(self.id, "seed", name, number).integers(2**31))

    def run(self, name: str) -> None:
        """Train what is not in the file yet."""
        spec, score = self.spec, self.spec.score
        known = self.content["peers"].setdefault(name, {"first_rung": {}, "scores": []})
        builders = {
            variant: build
            for variant in (("published",) if name == HIERA else ("published", "late"))
            if (build := builder(name, spec, late=variant == "late")) is not None
        }
        for variant, build in builders.items():
            if variant in known["first_rung"]:
                continue
            model = self._new(name, build, 0)
            size = {"parameters": sum(item.numel() for item in model.parameters()),
                    "macs": macs(model, (1, spec.space.image, spec.space.image))}  # fmt: skip
            found = 0.0
            if len(builders) > 1:
                seed = self.seed(name, 0)
                found = judged(model, spec, score.epochs[0], seed, self.rows.training, self.rows.choosing)
            known["first_rung"][variant] = {**size, "score": found}
            print(f"{name:18} {variant:10} {size} {score.epochs[0]} epochs: {found:.4f}", flush=True)
            self.write()
        known["variant"] = max(builders, key=lambda variant: known["first_rung"][variant]["score"])
        for number in range(len(known["scores"]), score.seeds):
            model = self._new(name, builders[known["variant"]], number)
            right = judged(
                model, spec, score.epochs[-1], self.seed(name, number), self.all_training, self.rows.test
            )  # fmt: skip
            known["scores"].append(right)
            print(f"{name:18} {known['variant']:10} seed {number}: {right:.4f}", flush=True)
            self.write()

    def _new(self, name: str, build: Callable[[], nn.Module], number: int) -> nn.Module:
        torch.manual_seed(self.seed(name, number))
        return build()

    def finalists(self) -> list[tuple[str, Trained]]:
        """Return the arm and the network of each finalist of the study that has all its seeds, best first."""
        score, groups = self.spec.score, dict[tuple[str, str], list[float]]()
        for item in self.events:
            if item["rung"] == len(score.epochs) - 1:
                groups.setdefault((item["arm"], item["key"]), []).append(item["score"])
        found = [(arm, Trained(key, tuple(s))) for (arm, key), s in groups.items() if len(s) == score.seeds]
        return sorted(found, key=lambda item: -item[1].mean)

    def repeated(self) -> dict[str, Any]:
        """Train a finalist again, here, and return whether the result is the study's."""
        last = next(item for item in self.events if item["rung"] == len(self.spec.score.epochs) - 1)
        seed = self.seed(last["key"], last["seed"])
        torch.manual_seed(seed)
        model = hiera.build(**last["arguments"])
        here = judged(model, self.spec, self.spec.score.epochs[-1], seed, self.all_training, self.rows.test)
        if here != last["score"]:
            raise SystemExit(f"{last['key']}: {here} here and {last['score']} in the study: not the same procedure")
        return {"key": last["key"], "seed": last["seed"], "score": here}


def compared(finalists: Sequence[Trained], peers: Sequence[Trained], noise: Noise) -> list[dict[str, str]]:
    """Return a verdict on each finalist against each peer."""
    return [
        {"finalist": one.name, "peer": other.name, "verdict": WORSE[verdict(one, other, noise)]}
        for one in finalists
        for other in peers
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="a folder of `edgekit search`; its data file is sought from here")
    parser.add_argument("--peers", type=Path, required=True, help="the folder that timm and fastervit are in")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(HIERA, *FAMILIES), default=(HIERA, *FAMILIES))
    options = parser.parse_args()
    versions = use(options.peers)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    bench = Bench(options.study, options.json)
    bench.write(machine=machine.describe(), torch=torch.__version__, **versions)
    for name in options.only:
        bench.run(name)
    finalists = bench.finalists()
    if not finalists:
        raise SystemExit(f"{options.study} has no finalist with all its seeds yet; run `edgekit search resume` first")
    peers = [
        Trained(name, tuple(item["scores"]))
        for name, item in bench.content["peers"].items()
        if len(item["scores"]) == bench.spec.score.seeds
    ]
    networks = [item for _, item in finalists]
    noise = noise_of([*networks, *peers])
    assert noise is not None
    rows = compared(networks, peers, noise)
    bench.write(
        finalists=[{"arm": arm, "key": item.name, "scores": item.scores} for arm, item in finalists],
        noise={"spread": noise.spread, "distinguishable": noise.distinguishable, "ceiling": noise.ceiling},
        verdicts=rows, repeated=bench.content.get("repeated") or bench.repeated(),
    )  # fmt: skip
    for item in (*networks, *peers):
        print(f"{item.name:20} mean {item.mean:.4f}, s.d. {np.std(item.scores, ddof=1):.4f}, {len(item.scores)} seeds")
    print(
        f"noise: s.d. {noise.spread:.4f} between seeds; means that differ by less than {noise.distinguishable:.4f} are "
        f"not distinguishable; Spearman between two seeds {noise.ceiling:.2f}"
    )
    for row in rows:
        print(f"{row['finalist']} against {row['peer']}: {row['verdict']}")


if __name__ == "__main__":
    main()
