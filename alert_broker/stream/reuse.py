"""Reuse of classifications: an alert without new data gets the classification of its object's last alert, with `fresh`
false.

No new data means that the detections in the model's light curve are equal, bit for bit, to those of that alert. Surveys
send many such alerts: the new detection is in a band that the model does not use, or in an exposure that the light
curve already has. With `same="points"` forced photometry must be equal too, and then reuse gives what classifying would
give. With "detections" the result may miss new forced fluxes of exposures without a detection.

A stored classification belongs to one classifier, hence to one model. If it is lost in a restart or evicted, the alert
is classified again and is `fresh`. A repeated alert in a replay is compared with the data before it, so it is
classified as it was the first time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.classify import for_survey
from alert_broker.features import LightCurveFeatures
from alert_broker.packets import AlertBatch
from alert_broker.results import CLASSIFIED, repeat, result_rows, result_schema
from edgekit.errors import EdgekitError, unknown

COLUMNS = (pa.field("fresh", pa.bool_()), pa.field("reused_from", pa.int64()))
TEXTS = ("status", "best_class")
CONSTANT = ("model", "bundle", "prior")  # columns that are the same for all rows of a classifier
CAPACITY = 200_000  # objects, some 400 bytes each: about as many as have alerts in one night
Same = Literal["detections", "points"]


def output_schema(classes: Sequence[str]) -> pa.Schema:
    """The columns that the stream publishes: those of results, `fresh` and `reused_from`, which is null for fresh
    alerts."""
    return with_reuse(result_schema(classes))


def with_reuse(schema: pa.Schema) -> pa.Schema:
    for item in COLUMNS:
        schema = schema.append(item)
    return schema


class Stage(Protocol):
    """The part of `Classifier` that this module uses."""

    features: LightCurveFeatures
    schema: pa.Schema

    def __call__(self, batch: AlertBatch) -> pa.RecordBatch: ...


@dataclass(slots=True)
class _Entry:
    """The classification of one alert of an object. numbers: best_probability and the probabilities, float32; texts:
    the columns TEXTS; both are empty until the alert's batch is classified."""

    key: bytes
    alert_id: int
    numbers: bytes = b""
    texts: tuple[str | None, ...] = ()


class Reuse:
    """Replaces a classifier: it returns a row with two more columns for every alert of the batch, in order. It is not
    safe to use from several threads.

    The result depends on the order of the alerts, and not on how they are cut into batches.
    """

    def __init__(self, classifier: Stage, capacity: int = CAPACITY, same: Same = "detections") -> None:
        if capacity < 1:
            raise EdgekitError(f"the capacity of the cache of objects is {capacity}; expected 1 or more")
        if same not in ("detections", "points"):
            raise unknown("value of same", same, ("detections", "points"))
        self.classifier, self.capacity, self.same = classifier, capacity, same
        self.schema = with_reuse(classifier.schema)
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._constant: dict[str, str] = {}
        self._numbers = [name for name in classifier.schema.names if name == "best_probability" or name[:2] == "p_"]

    def __len__(self) -> int:
        return len(self._entries)

    def __call__(self, batch: AlertBatch) -> pa.RecordBatch:
        keys, count = self._keys(batch), len(batch.curves)
        if keys is None:
            rows = self.classifier(batch)
            return self._complete(rows, np.ones(count, np.bool_), np.zeros(count, np.int64))
        indices, sources = self._assign(batch, keys)
        fresh = np.zeros(count, np.bool_)
        fresh[indices] = True
        try:
            if len(indices) == count:
                rows = self.classifier(batch)
                self._remember(sources, rows)
            else:
                if indices:
                    self._remember([sources[index] for index in indices], self.classifier(batch.take(indices)))
                rows = self._rows(batch, sources)
        except BaseException:
            self._entries.clear()  # entries that wait for results of the failed batch
            raise
        # the text is a reason and not a class
        fresh |= np.array([entry.texts[0] != CLASSIFIED for entry in sources], np.bool_)
        return self._complete(rows, fresh, np.array([entry.alert_id for entry in sources], np.int64))

    def _keys(self, batch: AlertBatch) -> list[bytes] | None:
        """Return (alerts,) digests of the points that are compared; None if the model cannot classify this survey."""
        if any(band not in batch.survey.bands for band in self.classifier.features.seen):
            return None
        chosen = for_survey(self.classifier.features, batch.survey).select(batch.curves)
        if self.same == "detections":
            chosen = chosen.where(chosen.detected)
        points = np.column_stack([chosen.time, chosen.flux, chosen.flux_error, chosen.band, chosen.detected])
        data, width = points.astype("<f8").tobytes(), 8 * points.shape[1]
        ends = (width * chosen.offsets).tolist()
        return [hashlib.blake2b(data[start:end], digest_size=16).digest() for start, end in pairwise(ends)]

    def _assign(self, batch: AlertBatch, keys: list[bytes]) -> tuple[list[int], list[_Entry]]:
        """Return the indices of the alerts to classify, and for each alert the entry that holds its classification."""
        entries, survey = self._entries, batch.survey.name
        indices: list[int] = []
        sources: list[_Entry] = []
        objects, alerts = batch.alerts["object_id"].to_pylist(), batch.alerts["alert_id"].to_pylist()
        for index, (name, alert, key) in enumerate(zip(objects, alerts, keys, strict=True)):
            entry = entries.get((survey, name))
            if entry is None or entry.key != key or entry.alert_id == alert:
                entry = entries[survey, name] = _Entry(key, alert)
                indices.append(index)
                if len(entries) > self.capacity:
                    entries.popitem(last=False)
            entries.move_to_end((survey, name))
            sources.append(entry)
        return indices, sources

    def _remember(self, entries: list[_Entry], rows: pa.RecordBatch) -> None:
        """Store the classifications of alerts."""
        columns = [rows[name].to_numpy(zero_copy_only=False) for name in self._numbers]  # NaN for null
        numbers = np.column_stack(columns).astype(np.float32)
        texts = zip(*(rows[name].to_pylist() for name in TEXTS), strict=True)
        for entry, row, text in zip(entries, numbers, texts, strict=True):
            entry.numbers, entry.texts = row.tobytes(), text
        self._constant = {name: rows[name][0].as_py() for name in CONSTANT}

    def _rows(self, batch: AlertBatch, sources: list[_Entry]) -> pa.RecordBatch:
        """Return rows with the columns of each alert and its entry's classification."""
        count = len(sources)
        numbers = np.frombuffer(b"".join(entry.numbers for entry in sources), np.float32).reshape(count, -1)
        columns = {name: pa.array(numbers[:, k], from_pandas=True) for k, name in enumerate(self._numbers)}
        columns |= {name: pa.array([entry.texts[k] for entry in sources], pa.string()) for k, name in enumerate(TEXTS)}
        columns |= {name: repeat(value, count) for name, value in self._constant.items()}
        return result_rows(batch, self.classifier.schema, columns)

    def _complete(
        self, rows: pa.RecordBatch, fresh: npt.NDArray[np.bool_], reused_from: npt.NDArray[np.int64]
    ) -> pa.RecordBatch:
        arrays = [*rows.columns, pa.array(fresh), pa.array(reused_from, mask=fresh)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)
