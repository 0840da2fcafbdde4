"""Score the images of alerts: the stage beside the classifier, with a network of its own.

A row has two more columns: `drb`, the probability that the images show a real source, and `drb_model`, the network's
digest. `drb` is null if the images cannot be read or the network's answer is not a number; the reasons are counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.cutouts.reader import READ, REASONS, CutoutReader
from alert_broker.cutouts.tensors import IMAGES, CutoutTensors
from alert_broker.packet_images import Triplet
from alert_broker.packets import AlertBatch
from alert_broker.results import SHORT_DIGEST, CutoutAccount, repeat
from edgekit.bundle.format import Bundle
from edgekit.errors import EdgekitError
from edgekit.session import open_session

REAL = "real"  # the class whose probability is the score
NOT_FINITE = "the network's answer is not a number"
COLUMNS = (pa.field("drb", pa.float32()), pa.field("drb_model", pa.string()))
AT_ONCE = 512  # alerts whose inputs are in memory: braai takes 48 kB for each
STAGES = ("cutouts", "cutout-inference")  # reading the images, running the network


class CutoutScorer:
    """One network of cutouts on one runtime. threads: that read images; session_threads: of the runtime.

    seconds: what reading and inference took so far; scored, unscored: alerts with a score, and those without by reason.
    Together they are all alerts that were given.
    """

    def __init__(
        self, bundle: Bundle, runtime: str = "auto", *, threads: int = 1, session_threads: int | None = None
    ) -> None:
        source = str(bundle.path or bundle.manifest.name)
        self.bundle = bundle
        self.reader = CutoutReader(CutoutTensors.from_bundle(bundle.manifest.preprocessing, source), threads=threads)
        self._input, self._output, self._real = _names(bundle, self.reader.tensors, source)
        self.reader.tensors.warm_up()
        self.session = open_session(bundle, runtime, **({"threads": session_threads} if session_threads else {}))
        self._digest = bundle.digest[:SHORT_DIGEST]
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.scored = 0
        self.unscored: Counter[str] = Counter()

    def warm_up(self) -> None:
        """Run once, so that the first alert need not wait."""
        self.session.warmup(AT_ONCE)

    def __call__(self, batch: AlertBatch) -> dict[str, pa.Array]:
        """Return COLUMNS for every alert, in the same order."""
        assert batch.images is not None
        count = len(batch.images)
        parts = [self._score(batch.images[start : start + AT_ONCE]) for start in range(0, count, AT_ONCE)]
        scores, codes = (np.concatenate(part) for part in zip(*parts, strict=True))
        finite = np.isfinite(scores)
        self.scored += int(finite.sum())
        for code, number in zip(*np.unique(codes[codes != READ], return_counts=True), strict=True):
            self.unscored[REASONS[code]] += int(number)
        if strange := int(((codes == READ) & ~finite).sum()):
            self.unscored[NOT_FINITE] += strange
        return {"drb": pa.array(scores, mask=~finite), "drb_model": repeat(self._digest, count)}

    def _score(self, images: Sequence[Triplet]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Return the score of each alert, NaN if it has none, and its code (see CutoutReader)."""
        started = time.perf_counter()
        inputs, codes = self.reader(images)
        read = time.perf_counter()
        scores = np.full(len(images), np.nan, np.float32)
        if len(rows := np.flatnonzero(codes == READ)):
            chosen = inputs if len(rows) == len(images) else inputs[rows]
            scores[rows] = self.session.run({self._input: chosen})[self._output][:, self._real]
        self.seconds["cutouts"] += read - started
        self.seconds["cutout-inference"] += time.perf_counter() - read
        return scores, codes

    def outcomes(self) -> dict[str, int]:
        """Return how many alerts were "scored", and how many were not for each reason, so far."""
        return {"scored": self.scored, **self.unscored}

    def account(self, runtime: str) -> CutoutAccount:
        """Return what was scored so far. runtime: the name of the runtime that was asked for."""
        shown = f"{runtime}, {self.session.provider}, {self.session.device}"
        name = self.bundle.manifest.name
        return CutoutAccount(name, self.bundle.digest, shown, self.scored, Counter(self.unscored))


def _names(bundle: Bundle, tensors: CutoutTensors, source: str) -> tuple[str, str, int]:
    """Return the names of input and output and the output's column for real sources. Raises EdgekitError if the model
    does not take the images that its preprocessing makes, or has no such class."""
    inputs, outputs, classes = bundle.manifest.inputs, bundle.manifest.outputs, bundle.manifest.classes
    if len(inputs) != 1 or inputs[0].shape[1:] != tensors.shape or inputs[0].dtype != "float32":
        shown = ", ".join(f"{spec.name} {spec.shape_text} {spec.dtype}" for spec in inputs)
        raise EdgekitError(
            f"{source}: it takes {shown}; its preprocessing makes one input (batch, "
            f"{', '.join(map(str, tensors.shape))}) float32 of {IMAGES} images"
        )
    if len(outputs) != 1 or REAL not in classes or outputs[0].shape[1:] != (len(classes),):
        shown = ", ".join(f"{spec.name} {spec.shape_text}" for spec in outputs)
        raise EdgekitError(
            f"{source}: its outputs are {shown} and its classes {', '.join(classes) or 'none'}; expected one output "
            f"with a column for each class, and a class {REAL!r}"
        )
    return inputs[0].name, outputs[0].name, classes.index(REAL)
