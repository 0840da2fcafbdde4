"""Classify alerts: compute features from light curves and probabilities from features, one row for every alert. The run
over files accounts for every packet that it read.

`Classifier` is the stage that the stream's consumer uses as well; `classify_files` is the run over files.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Timer

import numpy as np
import pyarrow as pa

from alert_broker import gaussian_process
from alert_broker.avro import columns as avro
from alert_broker.containers import BadPacket
from alert_broker.cutouts.scorer import COLUMNS as CUTOUT_COLUMNS
from alert_broker.cutouts.scorer import CutoutScorer
from alert_broker.features import LightCurveFeatures
from alert_broker.gaussian_process import Status
from alert_broker.packets import AlertBatch, PacketSource, batches, file_name, find_files, read_blocks
from alert_broker.priors import UNIFORM, Prior, weigh
from alert_broker.results import (
    CLASSIFIED,
    ERRORS,
    SHORT_DIGEST,
    Account,
    ResultTable,
    fill,
    repeat,
    result_rows,
    result_schema,
    texts,
)
from alert_broker.surveys.base import Survey, surveys
from alert_broker.work_budget import Budget
from edgekit import __version__
from edgekit.bundle.files import refuse_to_overwrite
from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError
from edgekit.importers.files import resolve
from edgekit.session import check_inputs, open_session

# ZTF's public survey has two bands, and DECam has no u and y. The six-band model was trained on PLAsTiCC, which is a
# simulation of LSST.
DEFAULT_MODELS = {
    "ztf": "t2-gr",
    "decam": "t2-gr",
    "lsst": "t2-ugrizy",
    "elasticc": "t2-ugrizy",
    "elasticc-v0": "t2-ugrizy",
}
UNCLASSIFIED = {Status.NO_POINTS: "no points in", Status.NO_FLUX: "no flux in", Status.OVERFLOW: "flux out of range in"}
OVER_TIME = "the Gaussian process did not end within its time budget"
NOT_FINITE = "the numbers grew out of range"  # of float32, before or in the network
EQUAL = Prior(UNIFORM, {})  # what the models were trained for
NOTE_AFTER_SECONDS = 1.0  # seconds of compilation; loading the kernels from numba's cache takes less

Stage = Callable[[AlertBatch], pa.RecordBatch]
Progress = Callable[[int, int, int], None]  # bytes read, bytes in all, packets read


def for_survey(features: LightCurveFeatures, survey: Survey) -> LightCurveFeatures:
    """Return the features with the survey's own filters. This is the only intended difference between training and
    serving.

    A bundle holds the wavelengths of the survey that the model was trained on. The Gaussian process needs the
    wavelengths at which the points were really taken: ZTF's r is 200 angstrom redder than Rubin's. Bands are matched by
    name. A band that the survey lacks has no points; the classifier needs it only if the network sees it.
    """
    wavelength = dict(zip(survey.bands, survey.wavelengths, strict=True))
    shared = tuple(band for band in features.bands if band in wavelength)
    return replace(features, bands=shared, wavelengths=tuple(wavelength[band] for band in shared))


class Classifier:
    """One model on one runtime. It turns a batch of alerts into a record batch of `result_schema(classes)`, in the same
    order.

    threads: threads of the Gaussian process; session_threads: threads of the runtime; the default of both is all cores.
    budget: limits the time that the Gaussian process may take for an alert; prior: the class shares that the answers
    are for. `seconds` adds up the time that features and inference took.
    """

    def __init__(
        self,
        bundle: Bundle,
        runtime: str = "onnxruntime",
        *,
        threads: int | None = None,
        session_threads: int | None = None,
        budget: Budget | None = None,
        prior: Prior = EQUAL,
    ) -> None:
        source = str(bundle.path or bundle.manifest.name)
        self.bundle, self._threads, self._budget = bundle, threads, budget
        self.classes = bundle.manifest.classes
        self.features = LightCurveFeatures.from_bundle(bundle.manifest.preprocessing, source)
        if {"redshift", "redshift_error"} & set(self.features.context):
            raise EdgekitError(
                f"{source}: the model takes the redshift of the host galaxy, which alert packets do not give; "
                "use a model without redshift, such as t2-ugrizy"
            )
        _check_shapes(bundle, self.features, source)
        self._prior, self._weights = prior.name, prior.weights(self.classes, source)
        self.session = open_session(bundle, runtime, **({"threads": session_threads} if session_threads else {}))
        self.schema = result_schema(self.classes)
        self._digest = bundle.digest[:SHORT_DIGEST]
        self.seconds = {"features": 0.0, "inference": 0.0}

    def __call__(self, batch: AlertBatch) -> pa.RecordBatch:
        """Return a row for every alert. If an alert could not be classified, `status` says why and its probabilities
        are null."""
        name, survey, count = self.bundle.manifest.name, batch.survey, len(batch.curves)
        identity = {"model": repeat(name, count), "bundle": repeat(self._digest, count)}
        identity["prior"] = repeat(self._prior, count)
        if lacking := [band for band in self.features.seen if band not in survey.bands]:
            reason = f"skipped: {name} needs {', '.join(lacking)}, which {survey.name} does not observe"
            return result_rows(batch, self.schema, identity | {"status": repeat(reason, count)})
        started = time.perf_counter()
        features = for_survey(self.features, survey)(batch.curves, threads=self._threads, budget=self._budget)
        self.seconds["features"] += time.perf_counter() - started

        bands = ", ".join(self.features.seen)
        reasons = [CLASSIFIED, *(f"{text} {bands}" for text in UNCLASSIFIED.values()), NOT_FINITE, OVER_TIME]
        why = np.zeros(count, np.int64)  # index into the reasons
        inputs = features.inputs()
        for array in inputs.values():
            why[~np.isfinite(array.reshape(count, -1)).all(axis=1)] = reasons.index(NOT_FINITE)
        for number, status in enumerate(UNCLASSIFIED, start=1):
            why[features.status == status] = number
        why[features.status == Status.OVER_TIME] = reasons.index(OVER_TIME)
        started = time.perf_counter()
        probabilities = np.zeros((count, len(self.classes)), np.float32)
        if len(rows := np.flatnonzero(why == 0)):
            good = {key: array[rows] for key, array in inputs.items()}
            probabilities[rows] = self.session.run(good)[self.bundle.manifest.outputs[0].name]
            why[~np.isfinite(probabilities).all(axis=1)] = reasons.index(NOT_FINITE)
            if self._weights is not None:
                probabilities = weigh(probabilities, self._weights)
        self.seconds["inference"] += time.perf_counter() - started

        null, best = why != 0, probabilities.argmax(axis=1)
        columns = {f"p_{label}": pa.array(probabilities[:, k], mask=null) for k, label in enumerate(self.classes)}
        columns |= {
            "status": texts(why, reasons),
            "best_class": texts(best, self.classes, null),
            "best_probability": pa.array(probabilities[np.arange(count), best], mask=null),
        }
        return result_rows(batch, self.schema, identity | columns)


class Classifiers:
    """The models of all surveys. They turn batches of any survey into record batches of one schema.

    bundle: one model for all surveys; by default each survey has its own. A given bundle is opened at once, so that an
    unusable one is reported before the work starts. Default models are opened when their first alert comes, or by
    `open_all`. prior: the class shares that the answers are for. wrap: a function that is applied to each classifier
    and adds `columns` to its result. cutouts: the second model, which scores the images of every alert.
    """

    def __init__(
        self,
        bundle: Bundle | None,
        runtime: str,
        *,
        threads: int | None = None,
        wrap: Callable[[Classifier], Stage] = lambda classifier: classifier,
        columns: Sequence[pa.Field] = (),
        budget: Budget | None = None,
        prior: Prior = EQUAL,
        cutouts: CutoutScorer | None = None,
    ) -> None:
        self.cutouts = cutouts
        columns = [*columns, *(CUTOUT_COLUMNS if cutouts else ())]
        self.models = default_models() if bundle is None else dict.fromkeys(surveys(), bundle)
        self.classes = tuple(dict.fromkeys(name for item in self.models.values() for name in item.manifest.classes))
        self.schema = pa.schema([*result_schema(self.classes), *columns])
        self.opened: dict[str, Classifier] = {}  # by the bundle's digest
        self._stages: dict[str, Stage] = {}
        self._digests = {survey: item.digest for survey, item in self.models.items()}
        self._runtime, self._threads, self._wrap, self._budget, self.prior = runtime, threads, wrap, budget, prior
        self.start_seconds = 0.0
        if bundle is not None:
            self.open_all()

    def open_all(self) -> None:
        for survey in self.models:
            self._of(survey)

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that features and inference have taken so far, and those of the cutouts if they are scored."""
        stages = ("features", "inference")
        seconds = {stage: sum(item.seconds[stage] for item in self.opened.values()) for stage in stages}
        return seconds | (self.cutouts.seconds if self.cutouts else {})

    def __call__(self, batch: AlertBatch) -> pa.RecordBatch:
        """Return a row of `schema` for every alert, in the same order."""
        count = len(batch.curves)
        if batch.survey.name not in self.models:
            reason = f"skipped: {batch.survey.name} has no default model, name one with --model"
            rows = result_rows(batch, self.schema, {"status": repeat(reason, count)})
        else:
            rows = self._of(batch.survey.name)(batch)
        columns = dict(zip(rows.schema.names, rows.columns, strict=True))
        if self.cutouts is not None:
            columns |= self.cutouts(batch)
        return fill(columns, self.schema, count)

    def _of(self, survey: str) -> Stage:
        digest = self._digests[survey]
        if digest not in self.opened:
            started = time.perf_counter()
            self.opened[digest] = Classifier(
                self.models[survey], self._runtime, threads=self._threads, budget=self._budget, prior=self.prior
            )
            self._stages[digest] = self._wrap(self.opened[digest])
            self.start_seconds += time.perf_counter() - started
        return self._stages[digest]


def default_models() -> dict[str, Bundle]:
    """Return the zoo's model for each survey."""
    bundles = {name: resolve(name) for name in dict.fromkeys(DEFAULT_MODELS.values())}
    return {survey: bundles[name] for survey, name in DEFAULT_MODELS.items()}


def classify_files(
    paths: Iterable[str | Path],
    output: Path,
    *,
    bundle: Bundle | None = None,
    runtime: str = "onnxruntime",
    batch: int = 1024,
    errors: Path | None = None,
    prior: Prior = EQUAL,
    cutouts: Bundle | None = None,
    cutouts_runtime: str = "auto",
    force: bool = False,
    progress: Progress = lambda done, total, packets: None,
    notify: Callable[[str], None] = lambda message: None,
    stop: Callable[[], bool] = lambda: False,
) -> Account:
    """Classify every alert in these files and folders into one Parquet file. Packets without a usable light curve go to
    the file `errors`.

    bundle: one model for all surveys; by default each survey has its own. stop: a function that is called before every
    block of packets; if it returns true, the packets that were read are classified and the run ends. Both files appear
    when the run ends, and are complete up to that point. cutouts: a model that scores the images of every alert, on
    `cutouts_runtime`.
    """
    files = find_files(paths)
    errors = errors or output.with_suffix(".errors.parquet")
    _check_targets(output, errors, files, force)
    account = Account(files=len(files), prior=prior.name)
    started = time.perf_counter()
    scorer = CutoutScorer(cutouts, cutouts_runtime, threads=gaussian_process.cores()) if cutouts else None
    account.seconds["start"] += time.perf_counter() - started
    classifiers = Classifiers(bundle, runtime, prior=prior, cutouts=scorer)
    started = time.perf_counter()
    load_kernels(notify)
    account.seconds["start"] += time.perf_counter() - started
    packets = _counted(files, account, progress, stop, images=scorer is not None)
    with ResultTable(output, classifiers.schema) as results, ResultTable(errors, ERRORS) as bad_packets:
        for item in _timed(batches(packets, batch, images=scorer is not None), account.seconds):
            if isinstance(item, BadPacket):
                account.add_bad(item)
                row = {name: [getattr(item, name)] for name in ERRORS.names}
                bad_packets.add(pa.RecordBatch.from_pydict(row, schema=ERRORS))
                continue
            rows = classifiers(item)
            account.add_rows(rows)
            results.add(rows)
        if scorer is not None:
            account.cutouts = scorer.account(cutouts_runtime)
        account.check(results.rows)
        account.seconds["start"] += classifiers.start_seconds
        account.seconds |= classifiers.seconds
        for classifier in classifiers.opened.values():
            account.models[classifier.bundle.manifest.name] = classifier.bundle.digest
            account.runtime = f"{runtime}, {classifier.session.provider}, {classifier.session.device}"
        results.describe({"edgekit": __version__, **account.to_json()})
    return account


def _check_targets(output: Path, errors: Path, files: Sequence[Path], force: bool) -> None:
    """Raise before the work starts if the results could not be written at its end."""
    read = {file.resolve() for file in files}
    for path in (output, errors):
        if path.suffix != ".parquet":
            raise EdgekitError(
                f"{path} does not end in .parquet; results are Parquet, so choose a name that ends in .parquet"
            )
        if path.resolve() in read:
            raise EdgekitError(f"{path} is among the files to be read; choose another name for the output")
        refuse_to_overwrite(path, force)
    if output.resolve() == errors.resolve():
        raise EdgekitError(
            f"{output} cannot hold both the results and the errors; give --output and --errors different names"
        )


def _check_shapes(bundle: Bundle, features: LightCurveFeatures, source: str) -> None:
    """Raise unless the model's inputs are those that its preprocessing makes, and its output has one probability for
    each class."""
    inputs = {"light_curve": np.zeros((1, features.grid_points, len(features.seen)), np.float32)}
    if features.context:
        inputs["context"] = np.zeros((1, len(features.context)), np.float32)
    try:
        check_inputs(bundle.manifest.inputs, inputs)
    except EdgekitError as error:
        raise EdgekitError(f"{source}: the preprocessing does not fit the model: {error}") from None
    outputs, classes = bundle.manifest.outputs, bundle.manifest.classes
    if len(outputs) != 1 or not classes or outputs[0].shape[1:] != (len(classes),):
        shapes = ", ".join(f"{spec.name} {spec.shape_text}" for spec in outputs)
        raise EdgekitError(f"{source}: its outputs are {shapes}; expected one, with a column for each class")


def load_kernels(notify: Callable[[str], None]) -> None:
    """Load the decoder and the Gaussian process, or compile them. `notify` gets a note if that takes long, because the
    program would otherwise be silent."""
    missing = [kernel for kernel in (avro, gaussian_process) if not kernel.is_compiled()]
    if not missing:
        return
    timer = Timer(
        NOTE_AFTER_SECONDS,
        notify,
        ["loading the light-curve kernels; the first run on a machine compiles them, which takes some seconds"],
    )
    timer.start()
    child = None
    try:
        if len(missing) == 2 and not avro.is_cached():
            # A process of its own uses the other core to compile the decoder, which this process then loads from
            # numba's cache.
            code = f"from {avro.__name__} import warm_up; warm_up()"
            child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            gaussian_process.warm_up()
            child.wait()
        for kernel in missing:
            kernel.warm_up()
    finally:
        timer.cancel()
        if child is not None:
            child.kill()
            child.wait()


def _counted(
    files: Sequence[Path], account: Account, progress: Progress, stop: Callable[[], bool], *, images: bool
) -> Iterator[PacketSource | BadPacket]:
    """Yield the packets of these files until `stop` returns true, and count them."""
    ends = np.cumsum([file.stat().st_size for file in files]).tolist()
    start_of = dict(zip(map(file_name, files), [0, *ends], strict=False))
    for item in read_blocks(files, images=images):
        if stop():
            account.stopped = True
            return
        account.packets += item.packets if isinstance(item, BadPacket) else item.count
        progress(start_of[item.file] + item.offset, ends[-1], account.packets)
        yield item
    progress(ends[-1], ends[-1], account.packets)


def _timed(items: Iterable[AlertBatch | BadPacket], seconds: dict[str, float]) -> Iterator[AlertBatch | BadPacket]:
    """Yield the same items. The time that it takes to make them is added to seconds["decode"]."""
    source = iter(items)
    while True:
        started = time.perf_counter()
        item = next(source, None)
        seconds["decode"] += time.perf_counter() - started
        if item is None:
            return
        yield item
