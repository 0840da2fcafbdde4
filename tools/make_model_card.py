"""Write the card of a t2 model of the zoo, README.md with its pictures, from the measurements of tools/train_t2.py.

    python tools/make_model_card.py t2-gr                     # reads runs/t2-gr, writes into models/t2-gr

The bundle in models/MODEL must come from the same runs; the tool refuses to write a card for other weights.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from scipy import stats

from edgekit import machine
from edgekit.bundle.files import write_file
from edgekit.bundle.format import Bundle
from edgekit.bundle.pack import pack
from edgekit.bundle.store import open_bundle
from edgekit.compression import plots
from edgekit.compression.metrics import ClassAveragedLogLoss, sample_losses
from edgekit.errors import EdgekitError

ROOT = Path(__file__).resolve().parents[1]
METRIC = ClassAveragedLogLoss()
# The number of objects of the PLAsTiCC training set by class id; the reference's split tests on a quarter of them.
OBJECTS = {
    6: 151,
    15: 495,
    16: 924,
    42: 1193,
    52: 183,
    53: 30,
    62: 484,
    64: 102,
    65: 981,
    67: 208,
    88: 370,
    90: 2313,
    92: 239,
    95: 175,
}
NEED = 100  # the card calls a class rare that has fewer training objects than this
# Published weights of t2 and tinho (github.com/tallamjr/astronet 8cf2bb3): the log-loss that this project measured on
# all 7,848 objects, and that of the authors' own logs on 869,864 objects of the challenge's test set.
PUBLISHED: dict[tuple[str, bool], list[tuple[str, float, float | None]]] = {
    ("gr", False): [
        ("t2", 1.167, 0.968),
        ("tinho, float32", 1.061, 0.836),
        ("tinho, quantized: the production file", 1.058, 0.834),
        ('tinho, "pruned"', 1.264, 1.017),
        ("production file behind its serving preprocessing", 4.148, None),
    ],
    ("ugrizy", False): [("t2, no redshift", 1.090, 0.873)],
    ("ugrizy", True): [
        ("t2, redshift", 1.129, 0.507),
        ("tinho, redshift", 1.441, 0.450),
        ('tinho, "pruned", redshift', 0.997, 0.636),
    ],
}
PLAIN_RETRAINING = {("ugrizy", True): 0.655}  # the published architecture, trained once on the same split

CARD = """\
# {{ name }}

This model classifies the light curve of a transient or variable object into {{ classes|length }} classes, from a \
first detection on. It reads {{ bands|length }} bands ({{ bands|join(", ") }}), {{ redshift }}. It has \
{{ "{:,}".format(parameters) }} parameters and takes {{ "{:,}".format(packed) }} bytes packed.

| log-loss, mean of {{ runs|length }} seed{{ "s" if runs|length > 1 }} | shipped weights (seed {{ seed }}) \
| error rate (seed {{ seed }}) |
|---|---|---|
| **{{ mean }}** | {{ shipped.log_loss|measured }} | {{ shipped.error_rate|measured }} |

The log-loss is the global average over classes, on {{ "{:,}".format(shipped.log_loss.samples) }} test objects with \
whole light curves. Lower is better; a model that gives all classes the same probability gets \
{{ "%.3f"|format(guess) }}.

## Intended use

Use the model to rank and route {{ survey }} alerts: it helps to choose the few alerts of a night that deserve a \
spectrum, a person or a larger model. The probabilities are inputs to a decision, not a spectroscopic classification. \
Do not use it for a census, because the class shares of the training data are not those of the sky.

    edgekit alerts classify alerts/ --model {{ name }} -o out.parquet
    edgekit inspect {{ name }}

Inputs: {% for spec in inputs %}`{{ spec.name }}` {{ spec.shape_text }} {{ spec.dtype }}, {{ spec.unit }}\
{{ "; " if not loop.last }}{% endfor %}. The preprocessing \
(`{{ preprocessing.id }}`: Gaussian-process interpolation over time and wavelength on {{ preprocessing.grid_points }} \
grid points, then a fixed scale per band) is part of the bundle; training and serving run the same function.

## Data

The data are the training set of PLAsTiCC, the Photometric LSST Astronomical Time-Series Classification Challenge: \
{{ "{:,}".format(total) }} simulated LSST light curves in six bands{% if bands|length < 6 %}. The model sees \
{{ bands|join(" and ") }}, interpolated from the points in every band that the survey has, as in the published \
preprocessing; five in nine of the training copies have points in {{ bands|join(" and ") }} alone{% endif %}.

- Credit: the PLAsTiCC team and the LSST Dark Energy Science Collaboration.
- Source: [Zenodo 2539456](https://doi.org/10.5281/zenodo.2539456), licence CC-BY-4.0; no light curve of it is \
part of this model.
- Split: by object, 25 % test, seed 42, as the reference implementation splits it: \
{{ "{:,}".format(total - tested) }} objects to train on, {{ "{:,}".format(tested) }} to test on. Test objects \
were never trained on.
{% if augmented %}
- Augmentation, training objects only: {{ "{:,}".format(augmented) }} light curves of the population that LSST finds, \
made from the training objects (another redshift, luminosity, visits and noise, after Boone 2019, arXiv 1907.04690; \
`tools/augment_plasticc.py`). All light curves are seen whole and as the histories of their detections, with and \
without forced photometry; brightness and noise varied.
{% else %}
- Augmentation, training objects only: light curves cut off early, thinned out, without forced photometry; brightness \
and noise varied.
{% endif %}

## Metric

The metric is the mean over classes of each class's mean -log p(true class), taken over the whole test set at once: \
the challenge's weighted log-loss with equal weights (Malz et al. 2019, AJ 158, 171, eq. 4). It is global on purpose. \
If it is averaged inside batches, as in the reference's training code, a class that a batch does not contain counts as \
a loss of 0, and the published two-band t2 gets 0.612 instead of 0.968. The error rates and shares below give the same \
weight to all objects, not to all classes.

## Results

| seed | log-loss [95 % interval] | error rate [95 % interval] | CPU seconds |
|---|---|---|---|
{% for run in runs %}
| {{ run.seed }}{{ " (shipped)" if run.seed == seed }} | {{ run.log_loss|measured }} | {{ run.error_rate|measured }} \
| {{ run.cpu_seconds }} |
{% endfor %}
{% if interval %}
| **mean** | **{{ mean }}** (95 % interval of the mean over seeds, Student's t) | | |
{% endif %}

Intervals of one seed are bootstrapped over test objects, class by class. The shipped seed was chosen before any \
result was known.
{% if folds %}
Cross-validation over all {{ "{:,}".format(folds.log_loss.samples) }} objects, {{ folds.folds }} stratified \
folds of {{ folds.epochs }} epochs each: \
**{{ folds.log_loss|measured }}**.
{% endif %}

### In comparison

Each column is another population, so compare numbers within one column only.

| model | this test set ({{ "{:,}".format(tested) }} objects) | published weights, measured by this project on all \
{{ "{:,}".format(total) }} objects | authors' own log, 869,864 objects of the challenge's test set |
|---|---|---|---|
| **{{ name }}** | **{{ mean }}** | | |
{% if plain %}
| published architecture, retrained plainly (one seed) | {{ "%.3f"|format(plain) }} | | |
{% endif %}
{% for model, ours, theirs in published %}
| published {{ model }} | | {{ "%.3f"|format(ours) }} | {{ "%.3f"|format(theirs) if theirs is not none }} |
{% endfor %}

The published weights were trained on three quarters of the challenge's test set and never saw these \
{{ "{:,}".format(total) }} objects. Their scaling constants were not published; here they are those of a 5,000-object \
sample, so the middle column is a reproduction, not the authors' claim.

{% if populations %}
### By population

The same objects in each row, whole or as they were at a random detection (`tools/evaluate_t2.py`, \
`benchmarks/t2_populations.json`). The augmented population is made from the test objects; SPCC is another simulation, \
of another survey. Each cell has the log-loss over SN II, Ibc and Ia, and the area under the ROC curve of SN Ia \
against the rest.

| population | objects | {{ rivals|join(" | ") }} |
|---|---|{% for rival in rivals %}---|{% endfor %}

{% for row in populations %}
| {{ row.name }} | {{ "{:,}".format(row.objects) }} | {{ row.cells|join(" | ") }} |
{% endfor %}

{% endif %}
{% if bands|length < 6 %}
### With {{ bands|join(" and ") }} alone

The numbers above give the Gaussian process all six bands, as the published ones do. A survey without the other four \
sends alerts only for objects that it detects in {{ bands|join(" and ") }}. The table has the test objects that are \
detected there:

| points | log-loss of the shipped weights [95 % interval] | objects |
|---|---|---|
| {{ bands|join(" and ") }}, forced photometry included | {{ shipped.log_loss_own_bands|measured }} | \
{{ "{:,}".format(shipped.log_loss_own_bands.samples) }} |
| {{ bands|join(" and ") }}, detections only, as in ZTF alerts | \
{{ shipped.log_loss_own_bands_without_forced_photometry|measured }} | \
{{ "{:,}".format(shipped.log_loss_own_bands_without_forced_photometry.samples) }} |

{% endif %}
### How early

![Log-loss against days since first detection](days.svg)

| days since first detection | {% for day in days %}{{ day }} | {% endfor %}whole |
|---|{% for day in days %}---|{% endfor %}---|
| log-loss{{ ", mean of seeds" if runs|length > 1 }} | {% for loss in early %}{{ "%.3f"|format(loss) }} | {% endfor %}\
{{ "%.3f"|format(whole) }} |

Each test light curve is cut off that long after its first detection; non-detections before it stay.\
{{ " Only points and detections in " ~ bands|join(" and ") ~ " are used." if bands|length < 6 }}

### Which classes

![Confusion matrix, rows normalized](confusion.svg)

| class | PLAsTiCC id | training objects | test objects | mean -log p(true) | found | purity |
|---|---|---|---|---|---|---|
{% for row in classes %}
| {{ row.name }} | {{ row.id }} | {{ row.train }} | {{ row.test }} | {{ "%.3f"|format(row.loss) }} \
| {{ "%.0f %%"|format(100 * row.found) }} | {{ "%.0f %%"|format(100 * row.purity) if row.purity is not none }} |
{% endfor %}

The table is for the shipped weights. Found is the share of the class's test objects for which it is the best class. \
Purity is the share of the objects given this class that belong to it, at the test set's class shares.

### Calibration

![Reliability curve](calibration.svg)

The expected calibration error of the best class's probability, in ten bins, is {{ "%.3f"|format(balanced.error) }} if \
all classes have the same weight, and {{ "%.3f"|format(plainly.error) }} if all objects have the same weight. The \
training gives all classes the same weight, so the probabilities hold for a population with equal shares. To use them \
on another population, multiply them by its class shares and normalize. Bars are 95 % Wilson intervals; bins of fewer \
than ten objects are not drawn.

## Limitations

- The data are simulated. Cadence, noise and host galaxies are those of the PLAsTiCC simulation of LSST\
{{ "; ZTF has other filters, another depth and another cadence, and no result on real, labelled ZTF alerts is claimed" \
if bands|length < 6 }}.
- We chose batch size, learning rate and context numbers on exploratory runs that were measured on the same test \
objects. So the log-loss is slightly optimistic; we did not measure by how much.
{% if augmented %}
- The originals of the augmented light curves are those of a spectroscopic sample: what is rare or absent in it stays \
so, and the light of a source in filters that no original was seen in is an extrapolation.
{% else %}
- The training set imitates a spectroscopic sample: its objects are brighter and nearer than those that a survey finds.
{% endif %}
- Rare classes: {% for row in rare %}{{ row.name }} ({{ row.train }} training, {{ row.test }} test objects)\
{{ ", " if not loop.last }}{% endfor %}. Their rows above rest on few objects, and through equal weights they carry \
much of the metric's interval.
- The model knows fourteen classes only. It gives one of them to an object of any other type, with a confidence that \
means nothing.
- On the day of the first detection the log-loss is {{ "%.3f"|format(early[0]) }}, against {{ "%.3f"|format(guess) }} \
for a guess: an early answer is a weak one.

## How it was trained

{% if augmented %}
    python tools/augment_plasticc.py --split train --copies 600 -o runs/augmented/train
{% endif %}
    python tools/train_t2.py {{ name }}{{ " --augmented runs/augmented/train" if augmented }} \
--seeds {{ runs|map(attribute="seed")|join(" ") }}
{% if folds %}
    python tools/train_t2.py {{ name }} --cross-validate {{ folds.folds }}
{% endif %}
    python tools/make_model_card.py {{ name }}

| | |
|---|---|
| seed of the shipped weights | {{ seed }} |
{% if shipped.start %}
| weights at the start (`--start`) | those of the bundle `{{ shipped.start }}` |
{% endif %}
| epochs | {{ epochs }} ([training_log.csv](training_log.csv): training loss by epoch) |
| versions | {{ versions }} |
| {{ "machine" if trained_on else "machine (of this card)" }} | {{ computer.cpu }}, {{ computer.cores }} cores, one \
thread per run |
| bundle | SHA-256 `{{ digest }}` |

Architecture: Allam Jr & McEwen, "Paying attention to astronomical transients", arXiv 2105.06178. Weights: this \
project's, Apache-2.0.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One seed: its result.json, test probabilities (objects, classes), labels (objects,) and training log."""

    result: dict[str, Any]
    probabilities: np.ndarray
    labels: np.ndarray
    log: str


def read_runs(folder: Path) -> list[Run]:
    """Read all finished seeds, in order."""
    runs = []
    for path in sorted(folder.glob("seed-*/result.json")):
        with np.load(path.parent / "test_probabilities.npz") as saved:
            run = Run(
                json.loads(path.read_text()),
                saved["probabilities"],
                saved["labels"],
                (path.parent / "log.csv").read_text(),
            )
        got, said = METRIC.value(run.probabilities, run.labels), run.result["log_loss"]["value"]
        if abs(got - said) > 1e-6:
            raise EdgekitError(f"{path}: says log-loss {said:.6f}, its probabilities give {got:.6f}; train it again")
        runs.append(run)
    if not runs:
        raise EdgekitError(f"{folder}: no finished seed; run: python tools/train_t2.py {folder.name}")
    return sorted(runs, key=lambda run: int(run.result["seed"]))


def shipped_run(runs: list[Run], bundle: Bundle) -> Run:
    """Return the run from which the bundle's weights come."""
    for run in runs:
        if run.result["seed"] == bundle.manifest.seed and run.result["log_loss"] == bundle.manifest.metrics["log_loss"]:
            return run
    raise EdgekitError(f"{bundle.path}: not from these runs (seed {bundle.manifest.seed}); run tools/train_t2.py again")


def mean_with_interval(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean over seeds and the half-width of its 95 % interval; None for a single seed."""
    if len(values) == 1:
        return float(values[0]), None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def class_rows(run: Run, bundle: Bundle) -> list[dict[str, Any]]:
    """Return counts and quality by class."""
    manifest = bundle.manifest
    counts = plots.confusion(run.probabilities, run.labels)
    losses = sample_losses(run.probabilities, run.labels)
    rows = []
    for label, (name, number) in enumerate(zip(manifest.classes, manifest.class_ids, strict=True)):
        tested, given = int(counts[label].sum()), int(counts[:, label].sum())
        rows.append(
            {
                "name": name,
                "id": number,
                "train": OBJECTS[number] - tested,
                "test": tested,
                "loss": float(losses[run.labels == label].mean()),
                "found": counts[label, label] / tested,
                "purity": counts[label, label] / given if given else None,
            }
        )
    return rows


def population_rows(measured: Path, bundle: Bundle) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the models and the rows of the table by population; none if the stored file is not of these weights."""
    stored = json.loads(measured.read_text()) if measured.is_file() else {"models": {}}
    if stored["models"].get(bundle.manifest.name) != bundle.digest:
        return [], []
    rivals = list(next(iter(stored["populations"].values()))["models"])
    rows = []
    for name, population in stored["populations"].items():
        found = [population["models"][rival] for rival in rivals]
        cells = [f"{item['supernovae']['value']:.3f}, {item['auc_snia']:.3f}" for item in found]
        rows.append({"name": name, "objects": population["objects"], "cells": cells})
    return rivals, rows


def write_card(bundle: Bundle, runs: list[Run], folds: dict[str, Any] | None, folder: Path, measured: Path) -> None:
    """Write README.md, three pictures and the training log."""
    manifest, shipped = bundle.manifest, shipped_run(runs, bundle)
    preprocessing = manifest.preprocessing or {}
    bands, context = preprocessing["channels"] or preprocessing["bands"], preprocessing["context"]
    seen = ("".join(bands), "redshift" in context)
    results = [run.result for run in runs]
    mean, half = mean_with_interval(np.array([result["log_loss"]["value"] for result in results]))
    days = sorted(map(int, shipped.result["log_loss_by_days_since_first_detection"]))
    early = np.array([[r["log_loss_by_days_since_first_detection"][str(day)] for day in days] for r in results])
    own = float(np.mean([result["log_loss_own_bands"]["value"] for result in results]))
    guess = float(np.log(len(manifest.classes)))
    classes = class_rows(shipped, bundle)
    answers = (shipped.probabilities, shipped.labels)
    balanced, plainly = (plots.reliability(*answers, balanced=way) for way in (True, False))
    figures = {
        "confusion": (
            plots.confusion_matrix(plots.confusion(*answers), manifest.classes),
            "Confusion matrix: per cent of each true class given each class",
        ),
        "calibration": (
            plots.reliability_curve({"classes alike": balanced, "objects as they come": plainly}),
            "Share correct against the probability given to the best class",
        ),
        "days": (
            plots.loss_by_days(days, early, own, guess, METRIC.name),
            "Log-loss against days since first detection",
        ),
    }
    for name, (figure, title) in figures.items():
        write_file(folder / f"{name}.svg", plots.to_svg(figure, title).encode())
    write_file(folder / "training_log.csv", ("epoch,loss\n" + shipped.log).encode())
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["measured"] = lambda item: f"{item['value']:.3f} [{item['low']:.3f}, {item['high']:.3f}]"
    trained_on = shipped.result.get("machine")
    rivals, populations = population_rows(measured, bundle)
    text = environment.from_string(CARD).render(
        name=manifest.name,
        bands=bands,
        inputs=manifest.inputs,
        preprocessing=preprocessing,
        seed=manifest.seed,
        redshift="with the host's photometric redshift" if seen[1] else "no redshift",
        survey="ZTF" if seen[0] == "gr" else "Rubin LSST",
        parameters=sum(v.size for v in bundle.weights().values()),
        packed=len(pack(bundle)),
        runs=results,
        shipped={"start": None, **shipped.result},
        interval=half is not None,
        mean=f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else ""),
        guess=guess,
        total=sum(OBJECTS.values()),
        tested=len(shipped.labels),
        folds=folds,
        augmented=shipped.result.get("augmented", 0),
        rivals=rivals,
        populations=populations,
        published=PUBLISHED.get(seen, []),
        plain=PLAIN_RETRAINING.get(seen),
        days=days,
        early=early.mean(axis=0),
        whole=own,
        classes=classes,
        balanced=balanced,
        plainly=plainly,
        rare=[row for row in classes if row["train"] < NEED],
        epochs=len(shipped.log.splitlines()),
        digest=bundle.digest,
        trained_on=trained_on,
        versions=", ".join(f"{name} {value}" for name, value in manifest.versions.items()),
        computer=trained_on or machine.describe(),
    )
    write_file(folder / "README.md", text.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder in models/ and in runs/, such as t2-gr")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="what tools/train_t2.py wrote")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="where the bundle is and the card goes")
    options = parser.parse_args()
    folder, runs = options.models / options.model, options.runs / options.model
    folds = runs / "cross_validation.json"
    try:
        measured = json.loads(folds.read_text()) if folds.is_file() else None
        stored = ROOT / "benchmarks" / "t2_populations.json"
        write_card(open_bundle(folder), read_runs(runs), measured, folder, stored)
    except EdgekitError as error:
        raise SystemExit(f"make_model_card: {error}") from None
    print(f"{folder}/README.md")


if __name__ == "__main__":
    main()
