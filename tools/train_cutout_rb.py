"""Train cutout-rb, the zoo's real/bogus network for cutouts, by distillation from braai, and write its bundle.

    python tools/train_cutout_rb.py ../shared/data/braai                  # runs/cutout-rb, models/cutout-rb
    python tools/train_cutout_rb.py ../shared/data/braai --part fold-1    # this training alone, for a second process
    python tools/train_cutout_rb.py ../shared/data/braai --search-data search.npz        # rows for tools/cutout_rb.toml

The folder needs ztf_triplets.npz (`images` (n, 3, 63, 63) float32, `object_id`, and the packets' `drb`) and
weights_d6_m7.npz and weights_d6_m9.npz, the published weights of braai. Changed copies of the triplets and simulated
ones (tools/augment_cutouts.py) are made once; d6_m7 scores each, and the network learns to give the same probabilities.

Quality is cross-validated: the objects are in FOLDS folds, and the network of a fold never saw a copy of its objects,
nor a sum with one. The network that is written was trained on all folds. A run that was stopped continues: finished
parts are kept, and a training goes on behind its last epoch.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from augment_cutouts import changed, copy_of, simulated, varied
from cutout_quality import agreement
from rich.progress import Progress
from torch import Tensor, nn

from alert_broker.cutouts import placed
from alert_broker.cutouts.braai import Braai, from_published
from alert_broker.cutouts.bundle import INPUT, placed_bundle
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit import machine
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import read_arrays
from edgekit.data.dataset import Dataset, save
from edgekit.errors import EdgekitError
from edgekit.nn import hiera
from edgekit.nn.training import Schedule, fit, probabilities

ROOT = Path(__file__).resolve().parents[1]
NAME, SIZE, SEED, FOLDS = "cutout-rb", 63, 0, 4
ALL = "all"  # the training on the copies of all triplets
PARTS = (*(f"fold-{fold}" for fold in range(FOLDS)), ALL)
SIDE = 32  # pixels along a side of the central part that the network sees
STUDY = "e053088567f81df2"  # of tools/cutout_rb.toml, which found NETWORK
NETWORK: dict[str, Any] = {
    "depths": [1, 1], "kinds": ["rep", "rep"], "ratios": [1, 1], "pools": [True], "width": 16, "head_dim": 1,
    "mask_unit": 1, "stem": "conv3x2", "image": SIDE, "channels": 3, "classes": 2,
}  # fmt: skip
SCHEDULE = Schedule(epochs=8, batch=128, learning_rate=5e-3, distillation=1.0)
COPIES, MORE_COPIES = 20, 60  # of a triplet that the packets call real, and of one that they call bogus
SIMULATED = 3000
VARIANTS = 9  # rows that are made of each copy and each simulated triplet
SEARCHED = 6000  # rows for the search
AT_ONCE = 256  # triplets that are scored together
NO_FOLD = -1  # of simulated triplets
TENSORS = CutoutTensors(SIZE, "rows", channels="first", crop=SIDE)
WHOLE = CutoutTensors(SIZE, "rows")  # what the teacher sees
Images = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Triplets:
    """The real triplets; fold: of each one's object."""

    images: Images
    drb: npt.NDArray[np.float64]
    fold: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Pool:
    """What the network learns from. inputs: (rows, 3, SIDE, SIDE), the central part; logits: (rows, 2), the teacher's;
    fold: of the objects that a row was made from."""

    inputs: Images
    logits: Images
    fold: npt.NDArray[np.int64]


class Learner(nn.Module):
    """The network, given the teacher's logits beside the image; it does not look at them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, logits: Tensor) -> Tensor:
        found: Tensor = self.network(image)
        return found


class Known(nn.Module):
    """A teacher whose logits are known."""

    def forward(self, image: Tensor, logits: Tensor) -> Tensor:
        return logits


def read_triplets(path: Path) -> Triplets:
    """Return the real triplets. Folds are drawn among the objects with a score below 0.5, and among the others."""
    if not path.is_file():
        raise EdgekitError(f"{path}: no such file; expected real triplets with images, object_id and drb")
    arrays = np.load(path)
    if missing := {"images", "object_id", "drb"} - set(arrays):
        raise EdgekitError(f"{path}: no array {min(missing)!r}; it has {', '.join(sorted(arrays))}")
    objects, drb, rng = arrays["object_id"], arrays["drb"], np.random.default_rng([SEED, 0])
    low = set(objects[drb < 0.5].tolist())
    fold_of: dict[str, int] = {}
    for group in (low, set(objects.tolist()) - low):
        fold_of |= {name: place % FOLDS for place, name in enumerate(rng.permutation(sorted(group)).tolist())}
    return Triplets(arrays["images"], drb, np.array([fold_of[name] for name in objects.tolist()]))


def teach(teacher: Braai, images: Images) -> tuple[Images, Images]:
    """Return the inputs of triplets, (rows, 3, SIDE, SIDE), and the teacher's logits."""
    with torch.no_grad():
        return TENSORS(images), teacher(torch.from_numpy(WHOLE(images))).numpy()


def make_simulated(number: int) -> Images:
    """Return a simulated triplet; every second one is changed as the real ones are."""
    rng = np.random.default_rng([SEED, 1, number])
    images = simulated(rng)
    return images if number % 2 else changed(images.astype(np.float64), simulated(rng).astype(np.float64), rng)


def make_copy(known: Triplets, row: int, copy: int) -> Images:
    """Return a changed copy of a real triplet, perhaps with sources of another one of the same fold."""
    rng = np.random.default_rng([SEED, 2, row, copy])
    other = rng.choice(np.flatnonzero(known.fold == known.fold[row]))
    return copy_of(known.images[row], known.images[other], rng)


def made(path: Path, teacher: Braai, jobs: Sequence[Callable[[], Images]], fold: npt.NDArray[np.int64]) -> Pool:
    """Return the rows of the triplets that the jobs make: those in the file, or new ones, which are then kept there."""
    if not path.is_file():
        parts: list[tuple[Images, Images]] = []
        folds: list[npt.NDArray[np.int64]] = []
        with Progress(disable=None, transient=True) as bar:
            task = bar.add_task(f"making {path.stem}", total=len(jobs))
            for first in range(0, len(jobs), AT_ONCE):
                images = np.stack([job() for job in jobs[first : first + AT_ONCE]])
                for variant in range(VARIANTS):
                    rng = np.random.default_rng([SEED, 3, first, variant])
                    partners = within_folds(fold[first : first + AT_ONCE], rng)
                    inputs, logits = teach(teacher, varied(images, partners, rng) if variant else images)
                    parts.append((inputs, logits))
                    folds.append(fold[first : first + AT_ONCE])
                bar.update(task, advance=len(images))
        inputs, logits = (np.concatenate(part) for part in zip(*parts, strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        with (unfinished := path.with_suffix(".part")).open("wb") as file:
            np.savez(file, inputs=inputs, logits=logits, fold=np.concatenate(folds))
        unfinished.replace(path)
    arrays = np.load(path)
    return Pool(arrays["inputs"], arrays["logits"], arrays["fold"])


def within_folds(fold: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """Return a row of the same fold for each row."""
    found = np.arange(len(fold))
    for value in np.unique(fold):
        rows = np.flatnonzero(fold == value)
        found[rows] = rng.permutation(rows)
    return found


def made_copies(known: Triplets, teacher: Braai, runs: Path) -> Pool:
    """Return changed copies of the real triplets."""
    pairs = [(row, n) for row, drb in enumerate(known.drb) for n in range(MORE_COPIES if drb < 0.5 else COPIES)]
    jobs = [functools.partial(make_copy, known, *pair) for pair in pairs]
    return made(runs / "copies.npz", teacher, jobs, known.fold[[row for row, _ in pairs]])


def made_simulated(teacher: Braai, runs: Path) -> Pool:
    """Return simulated triplets."""
    jobs = [functools.partial(make_simulated, number) for number in range(SIMULATED)]
    return made(runs / "simulated.npz", teacher, jobs, np.full(SIMULATED, NO_FOLD))


def train(pool: Pool, rows: npt.NDArray[np.intp], folder: Path) -> placed.Placed:
    """Return a network trained on these rows, with fused convolutions."""
    torch.manual_seed(SEED)
    network = placed.build(network=NETWORK).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = Dataset({"image": pool.inputs[rows], "logits": pool.logits[rows]}, np.zeros(len(rows), np.int64))
    folder.mkdir(parents=True, exist_ok=True)
    with Progress(disable=None, transient=True) as bar:
        task = bar.add_task(f"training, {folder.name}", total=SCHEDULE.epochs)

        def show(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done)
            with (folder / "log.csv").open("a") as log:
                log.write(f"{done},{loss:.5f}\n")

        learner = fit(
            Learner(network), data, SCHEDULE, seed=SEED, teacher=Known(), progress=show,
            checkpoint=folder / "checkpoint.pt",
        )  # fmt: skip
    assert isinstance(learner, Learner)
    assert isinstance(learner.network, placed.Placed)
    return hiera.fuse(learner.network.to(memory_format=torch.contiguous_format))  # type: ignore[call-overload]


def finished(pool: Pool, part: str, runs: Path) -> tuple[placed.Placed, float]:
    """Return the network of one of PARTS and its CPU seconds: trained now, or by an earlier run. The network of a fold
    learns from the rows of the other folds and from simulated ones."""
    weights, facts = runs / part / "weights.pt", runs / part / "training.json"
    if not weights.is_file():
        rows = np.arange(len(pool.fold)) if part == ALL else np.flatnonzero(pool.fold != PARTS.index(part))
        started = time.process_time()
        network = train(pool, rows, runs / part)
        facts.write_text(json.dumps({"rows": len(rows), "cpu_seconds": round(time.process_time() - started, 1)}))
        torch.save(network.state_dict(), weights)
    model = placed.build(fused=True, network=NETWORK)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval(), json.loads(facts.read_text())["cpu_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with the triplets and the published weights")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / NAME, help="folder for what is kept between runs")
    parser.add_argument("--output", type=Path, default=ROOT / "models" / NAME, help="bundle to write")
    parser.add_argument("--search-data", type=Path, help="write rows for `edgekit search` here, and train nothing")
    parser.add_argument("--part", choices=PARTS, help="train this part alone, and write no bundle")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    known = read_triplets(options.data / "ztf_triplets.npz")
    teacher = from_published(read_arrays(options.data / "weights_d6_m7.npz"))
    parts = [made_simulated(teacher, options.runs)]
    if options.search_data:
        write_search_data(parts[0], options.search_data)
        return
    parts.append(made_copies(known, teacher, options.runs))
    pool = Pool(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("inputs", "logits", "fold")))
    if options.part:
        finished(pool, options.part, options.runs)
        return
    d6_m9 = from_published(read_arrays(options.data / "weights_d6_m9.npz"))
    other = scores(d6_m9, CutoutTensors(SIZE, "image")(known.images))
    ours, seconds = np.empty(len(known.drb)), {}
    for part in PARTS[:-1]:
        network, seconds[part] = finished(pool, part, options.runs)
        rows = np.flatnonzero(known.fold == PARTS.index(part))
        ours[rows] = scores(network, TENSORS(known.images[rows]))
    network, seconds[ALL] = finished(pool, ALL, options.runs)
    ship(network, {"fold": known.fold, "drb": known.drb, "cutout_rb": ours, "d6_m9": other}, seconds, options)


def scores(network: nn.Module, inputs: Images) -> npt.NDArray[np.float64]:
    """Return the probability of a real source, for each row."""
    return probabilities(network, Dataset({INPUT: inputs}, np.zeros(len(inputs), np.int64)))[:, 1].astype(np.float64)


def ship(
    network: placed.Placed, table: dict[str, npt.NDArray[Any]], seconds: dict[str, float], options: argparse.Namespace
) -> None:
    """Write the bundle, the log of its training, and the scores of all real triplets that the card is made of."""
    share = agreement(table["drb"], table["cutout_rb"]).agree
    low, high = share.interval
    bundle = placed_bundle(
        network, {"fused": True, "network": NETWORK}, NAME, TENSORS, seed=SEED,
        metrics={"agreement_with_drb": {"value": share.value, "low": low, "high": high, "samples": share.of}},
    )  # fmt: skip
    write_bundle(bundle, options.output, force=True)
    lines = [",".join(table), *(",".join(f"{value:.6g}" for value in row) for row in zip(*table.values(), strict=True))]
    (options.output / "held_out.csv").write_text("\n".join(lines) + "\n")
    losses = (options.runs / "all" / "log.csv").read_text()
    (options.output / "training_log.csv").write_text("epoch,loss\n" + losses)
    facts = {
        "study": STUDY, "schedule": asdict(SCHEDULE), "copies": [COPIES, MORE_COPIES], "simulated": SIMULATED,
        "variants": VARIANTS, "cpu_seconds": seconds,
        "machine": "{cpu}, {cores} cores, one thread".format(**machine.describe()),
    }  # fmt: skip
    (options.output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{options.output}: {bundle.parameters:,} parameters; the same verdict as drb: {share}")


def write_search_data(pool: Pool, path: Path) -> None:
    """Write some rows with the teacher's verdicts as labels; every fifth one is for the test."""
    rows = np.random.default_rng([SEED, 4]).permutation(len(pool.fold))[:SEARCHED]
    split = (np.arange(len(rows)) % 5 == 0).astype(np.int64)
    save(path, {"image": pool.inputs[rows]}, pool.logits[rows].argmax(axis=1), split)


if __name__ == "__main__":
    main()
