"""Augment PLAsTiCC's training set to the population that a survey sends, and print it beside the sample.

    python tools/augment_plasticc.py --data ../shared/data/train --split train -o runs/augmented/train
    python tools/augment_plasticc.py --data ../shared/data/train --split test -o runs/augmented/test --seed 2

The split is the reference's, so no original object is in both sets. A stopped run continues with its next part; the
result does not depend on the number of processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from alert_broker import plasticc
from alert_broker.augment.augmentation import Augmented, Catalogue, Sources, augmented
from alert_broker.augment.files import claim_folder, join, load, save
from alert_broker.augment.population import TARGETS
from alert_broker.augment.visits import Histories, SampleHistories, ZtfHistories
from alert_broker.surveys.base import survey_named

PART = 100  # light curves in a file
SPLITS = {"train": (0,), "test": (1,), "all": (0, 1)}
QUANTILES = (10, 50, 90)


@dataclass(frozen=True, slots=True)
class Order:
    """What one process needs to make a part."""

    data: str
    split: str
    survey: str
    seed: int
    label: int
    first: int
    count: int
    path: str


@cache
def prepared(data: str, split: str, survey: str) -> tuple[Catalogue, Histories]:
    sample = plasticc.load(Path(data) if data else None)
    chosen = sample.take(np.flatnonzero(np.isin(sample.split(), SPLITS[split])))
    catalogue = Catalogue.of(chosen, survey_named("lsst").wavelengths, threads=1)
    if survey == "ztf":
        return catalogue, ZtfHistories()
    return catalogue, SampleHistories.of(chosen.curves, chosen.deep, catalogue.efficiency())


@cache
def sources_of(data: str, split: str, survey: str, label: int) -> Sources:
    return Sources(prepared(data, split, survey)[0], label)


def make(order: Order) -> int:
    """Write one part; return how many light curves it has."""
    catalogue, histories = prepared(order.data, order.split, order.survey)
    sources = sources_of(order.data, order.split, order.survey, order.label)
    numbers = range(order.first, order.first + order.count)
    with threadpool_limits(1):  # the matrices are too small for the threads of BLAS
        found = [augmented(catalogue, histories, sources, number, order.seed) for number in numbers]
    kept = [item[0] for item in found if item is not None]
    if kept:
        save(Path(order.path), join(kept))
    return len(kept)


def orders(options: argparse.Namespace) -> Iterator[Order]:
    for label in range(len(plasticc.CLASSES)):
        name = list(plasticc.CLASSES.values())[label]
        count = options.more if name in options.more_of else options.copies
        for first in range(0, count, PART):
            path = options.output / f"part-{label:02d}-{first:06d}.npz"
            if not path.is_file():
                size = min(PART, count - first)
                data = str(options.data or "")
                yield Order(data, options.split, options.survey, options.seed, label, first, size, str(path))


def report(sample: plasticc.Plasticc, new: Augmented) -> None:
    """Print redshifts, detections and brightness of the sample and of the augmented set, by class."""
    print("class      |  sample: n  z 10/50/90 %       detections   peak S/N | augmented: the same")
    for label, (identifier, name) in enumerate(plasticc.CLASSES.items()):
        parts = []
        for labels, redshift, curves in (
            (sample.label, sample.spectroscopic, sample.curves),
            (new.label, new.redshift, new.curves),
        ):
            rows = np.flatnonzero(labels == label)
            if len(rows) == 0:
                continue
            owner = curves.object_of_point
            found = np.bincount(owner[curves.detected], minlength=len(curves))[rows]
            best = np.zeros(len(curves))
            np.maximum.at(best, owner, np.abs(curves.flux) / curves.flux_error)
            redshifts = "/".join(f"{value:.2f}" for value in np.percentile(redshift[rows], QUANTILES))
            middles = (np.median(found), np.median(best[rows]))
            parts.append(f"{len(rows):6d} {redshifts:>15s} {middles[0]:8.0f} {middles[1]:10.1f}")
        print(f"{name:10s} | {' | '.join(parts)}{'' if identifier in TARGETS else '   (redshift kept)'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with plasticc_train_*.parquet, or the snmachine wheel")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--survey", choices=("lsst", "ztf"), default="lsst", help="whose visits and depth")
    parser.add_argument("--copies", type=int, default=900, help="light curves of each class")
    parser.add_argument("--more", type=int, default=2400, help="light curves of each class in --more-of")
    parser.add_argument("--more-of", nargs="*", default=["SNIa", "SNII", "SNIbc"], help="the most frequent classes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    settings = {name: getattr(options, name) for name in ("split", "survey", "copies", "more", "more_of", "seed")}
    claim_folder(options.output, settings)
    todo = list(orders(options))
    if options.processes == 1:
        done = sum(map(make, todo))
    else:
        with ProcessPoolExecutor(options.processes) as pool:
            done = sum(pool.map(make, todo))
    print(f"{options.output}: {done:,} new light curves in {len(todo)} parts")
    sample = plasticc.load(options.data)
    report(sample.take(np.flatnonzero(np.isin(sample.split(), SPLITS[options.split]))), load(options.output))


if __name__ == "__main__":
    main()
