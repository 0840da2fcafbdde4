"""The stages that need no Kafka: payloads are decoded to light curves, and light curves are classified."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from alert_broker import containers
from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import ReadPlan
from alert_broker.classify import OVER_TIME, Classifiers
from alert_broker.containers import BadPacket
from alert_broker.packets import AlertBatch, batches
from alert_broker.stream.dead_letters import DeadLetter, stack_digest
from alert_broker.work_budget import Budget, CancelledError
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
MOST_POOLED = 64  # schemas whose read buffers are kept for the next batch; packets may bring any number of schemas


class Stages:
    """Decodes and classifies batches of payloads. The schemas' read buffers are pooled from batch to batch. budget:
    that of the classifiers; a CancelledError ends the work on a batch. images: whether the classifiers need the
    images."""

    def __init__(
        self,
        classifiers: Classifiers,
        schema_text: Callable[[int], str] | None = None,
        budget: Budget | None = None,
        *,
        images: bool = False,
    ) -> None:
        self._images = images
        self.classifiers, self.schema_text, self._budget = classifiers, schema_text, budget or Budget()
        self._buffer_pool: dict[ReadPlan, Columns] = {}

    def decode(self, values: Sequence[bytes | None]) -> tuple[list[AlertBatch], list[DeadLetter]]:
        """Return the light curves, whose `offset` is the index of their message in the batch, and a dead letter for
        each message that gives none.

        Many alerts are decoded at once. If decoding fails for several of them with one reason, or fails as a whole,
        each is decoded again alone, so that one bad alert does not take the others with it.
        """
        indices = list(enumerate(values))
        try:
            alerts, dead_letters = self._decode(indices)
        except (EdgekitError, CancelledError):
            raise  # the registry does not answer, or the consumer stops: no alert is at fault
        except Exception:
            LOG.warning("decoding a batch failed; each of its alerts is decoded alone now", exc_info=True)
            alerts, dead_letters, again = [], [], indices
        else:
            reasons = Counter(dead_letter.reason for dead_letter in dead_letters)
            again = [
                (dead_letter.index, values[dead_letter.index])
                for dead_letter in dead_letters
                if reasons[dead_letter.reason] > 1
            ]
            dead_letters = [dead_letter for dead_letter in dead_letters if reasons[dead_letter.reason] == 1]
        for index in again:
            try:
                some, others = self._decode([index])
            except (EdgekitError, CancelledError):
                raise
            except Exception as error:
                reason = f"decoding failed ({type(error).__name__}: {error})"
                some, others = [], [DeadLetter(index[0], reason, stack=stack_digest(error))]
            alerts += some
            dead_letters += others
        return alerts, dead_letters

    def _decode(self, values: Sequence[tuple[int, bytes | None]]) -> tuple[list[AlertBatch], list[DeadLetter]]:
        alerts: list[AlertBatch] = []
        dead_letters: list[DeadLetter] = []
        blocks = (self._block(index, value) for index, value in values)
        buffer_pool, self._buffer_pool = self._buffer_pool, {}  # the buffers must not be used again if decoding raises
        for item in batches(blocks, len(values), buffer_pool, images=self._images):
            if isinstance(item, BadPacket):
                dead_letters.append(DeadLetter(item.offset, item.reason, item.status))
            else:
                alerts.append(item)
        self._buffer_pool = buffer_pool if len(buffer_pool) <= MOST_POOLED else {}
        return alerts, dead_letters

    def _block(self, index: int, value: bytes | None) -> containers.Block | BadPacket:
        self._budget.check()
        return containers.message(value or b"", index, self.schema_text)

    def classify(self, alerts: Sequence[AlertBatch]) -> tuple[pa.RecordBatch, list[DeadLetter]]:
        """Return the rows of all alerts that can be classified, in the order of their messages, and dead letters for
        the alerts on which the program fails or which take too long."""
        parts: list[pa.RecordBatch] = []
        dead_letters: list[DeadLetter] = []
        for batch in alerts:
            self._classify(batch, parts, dead_letters)
        if len(parts) == 1:
            return parts[0], dead_letters
        table = pa.Table.from_batches(parts, self.classifiers.schema).sort_by("offset").combine_chunks()
        return (table.to_batches() or [pa.RecordBatch.from_pylist([], self.classifiers.schema)])[0], dead_letters

    def _classify(self, batch: AlertBatch, parts: list[pa.RecordBatch], dead_letters: list[DeadLetter]) -> None:
        count = len(batch.curves)
        try:
            rows = self.classifiers(batch)
        except (EdgekitError, CancelledError):
            raise  # the model cannot be used, or the consumer stops: the alert is not at fault
        except Exception as error:
            if count > 1:  # halve the batch until the alert that fails is alone
                middle = count // 2
                for start, stop in ((0, middle), (middle, count)):
                    self._classify(batch.take(range(start, stop)), parts, dead_letters)
                return
            LOG.exception("classifying an alert failed")
            reason = f"classifying failed ({type(error).__name__}: {error})"
            dead_letters.append(DeadLetter(batch.alerts["offset"][0].as_py(), reason, stack=stack_digest(error)))
            return
        late = pc.fill_null(pc.equal(rows["status"], OVER_TIME), False)
        dead_letters += [
            DeadLetter(offset, f"{OVER_TIME}: {self._budget.seconds:g} s (model.alert_seconds)")
            for offset in rows["offset"].filter(late).to_pylist()
        ]
        parts.append(rows.filter(pc.invert(late)))
