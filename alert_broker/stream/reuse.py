"""An alert that brings nothing new has the classification of its object's last one, with `fresh` false.

Nothing new: the detections that the model's light curve is made of are the same, to the bit, as in that alert. A survey
sends such alerts all the time: the detection that raised it is in a band that the model does not see, or of an exposure
that the light curve already has. `same="points"` asks that forced photometry is the same, too: then reuse gives what
classifying would give, and with "detections" it may lag behind forced fluxes of exposures in which nothing was found.

Why it cannot be wrong otherwise: the cache belongs to one classifier, hence to one model, and lives and dies with it. A
cache that was lost in a restart, or an object that was forgotten, costs a classification and no more: the alert is
`fresh` then. An alert that comes again, in a replay, is not new to itself: it is classified as it was the first time.
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
CONSTANT = ("model", "bundle")  # of a classifier
CAPACITY = 200_000  # objects, of some 400 bytes each: a night of alerts is of about as many in a field that comes back
Same = Literal["detections", "points"]


def output_schema(classes: Sequence[str]) -> pa.Schema:
    """What the stream publishes: the columns of results, `fresh` and `reused_from`, null where fresh."""
    return with_reuse(result_schema(classes))


def with_reuse(schema: pa.Schema) -> pa.Schema:
    for item in COLUMNS:
        schema = schema.append(item)
    return schema


class Stage(Protocol):
    """A `Classifier`, as far as it is used here."""

    features: LightCurveFeatures
    schema: pa.Schema

    def __call__(self, batch: AlertBatch) -> pa.RecordBatch: ...


@dataclass(slots=True)
class _Entry:
    """What an object's alert was classified as. numbers: best_probability and the probabilities, float32; texts: as in
    TEXTS; both empty until its batch is classified."""

    key: bytes
    alert_id: int
    numbers: bytes = b""
    texts: tuple[str | None, ...] = ()


class Reuse:
    """In the place of a classifier: a row for every alert of the batch, in order, with two columns more. One thread.

    What it answers depends on the order of the alerts only, not on how they fall into batches.
    """

    def __init__(self, classifier: Stage, capacity: int = CAPACITY, same: Same = "detections") -> None:
        if capacity < 1:
            raise EdgekitError(f"the capacity of the cache of objects is {capacity}; expected 1 or more")
        if same not in ("detections", "points"):
            raise unknown("kind of sameness", same, ("detections", "points"))
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
        places, sources = self._assign(batch, keys)
        fresh = np.zeros(count, np.bool_)
        fresh[places] = True
        try:
            if len(places) == count:
                rows = self.classifier(batch)
                self._remember(sources, rows)
            else:
                if places:
                    some = AlertBatch(batch.survey, batch.curves.take(places), batch.alerts.take(pa.array(places)))
                    self._remember([sources[place] for place in places], self.classifier(some))
                rows = self._rows(batch, sources)
        except BaseException:
            self._entries.clear()  # some wait for results that will not come
            raise
        fresh |= np.array([entry.texts[0] != CLASSIFIED for entry in sources], np.bool_)  # a reason is not a class
        return self._complete(rows, fresh, np.array([entry.alert_id for entry in sources], np.int64))

    def _keys(self, batch: AlertBatch) -> list[bytes] | None:
        """(alerts,) digests of the points that decide; None if the model cannot see this survey."""
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
        """The alerts to be classified, and for each alert the entry that it has its classification from."""
        entries, survey = self._entries, batch.survey.name
        places: list[int] = []
        sources: list[_Entry] = []
        objects, alerts = batch.alerts["object_id"].to_pylist(), batch.alerts["alert_id"].to_pylist()
        for place, (name, alert, key) in enumerate(zip(objects, alerts, keys, strict=True)):
            entry = entries.get((survey, name))
            if entry is None or entry.key != key or entry.alert_id == alert:
                entry = entries[survey, name] = _Entry(key, alert)
                places.append(place)
                if len(entries) > self.capacity:
                    entries.popitem(last=False)
            entries.move_to_end((survey, name))
            sources.append(entry)
        return places, sources

    def _remember(self, entries: list[_Entry], rows: pa.RecordBatch) -> None:
        """Write down what alerts were classified as."""
        columns = [rows[name].to_numpy(zero_copy_only=False) for name in self._numbers]  # NaN for null
        numbers = np.column_stack(columns).astype(np.float32)
        texts = zip(*(rows[name].to_pylist() for name in TEXTS), strict=True)
        for entry, row, text in zip(entries, numbers, texts, strict=True):
            entry.numbers, entry.texts = row.tobytes(), text
        self._constant = {name: rows[name][0].as_py() for name in CONSTANT}

    def _rows(self, batch: AlertBatch, sources: list[_Entry]) -> pa.RecordBatch:
        """Rows with what is known of each alert anyway, and its entry's classification."""
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
