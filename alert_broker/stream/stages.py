"""What becomes of the bytes of a batch, from Avro to rows of classes; no Kafka in here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from alert_broker import containers
from alert_broker.avro.columns import Columns
from alert_broker.avro.plan import ReadPlan
from alert_broker.classify import Classifiers
from alert_broker.containers import BadPacket
from alert_broker.packets import AlertBatch, batches
from alert_broker.stream.dead_letters import DeadLetter, stack_digest
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")
MOST_SPARE = 64  # schemas whose grown columns are kept for the next batch; packets may bring any number of them


class Stages:
    """What becomes of the bytes of a batch; no Kafka in here."""

    def __init__(self, classifiers: Classifiers, schema_text: Callable[[int], str] | None = None) -> None:
        self.classifiers, self.schema_text = classifiers, schema_text
        self._buffer_pool: dict[ReadPlan, Columns] = {}

    def decode(self, values: Sequence[bytes | None]) -> tuple[list[AlertBatch], list[DeadLetter]]:
        """Light curves, whose `offset` is the number of their message, and the messages that give none.

        Columns are read for many alerts at once, and one that breaks the reading must not take the others along: what
        has failed together is looked at again alone.
        """
        places = list(enumerate(values))
        try:
            alerts, letters = self._decode(places)
        except EdgekitError:
            raise  # a registry that does not answer
        except Exception:
            LOG.warning("decoding a batch failed, so each alert of it is looked at alone", exc_info=True)
            alerts, letters, again = [], [], places
        else:
            reasons = Counter(letter.reason for letter in letters)
            again = [(letter.place, values[letter.place]) for letter in letters if reasons[letter.reason] > 1]
            letters = [letter for letter in letters if reasons[letter.reason] == 1]
        for place in again:
            try:
                some, others = self._decode([place])
            except EdgekitError:
                raise
            except Exception as error:
                reason = f"decoding failed ({type(error).__name__}: {error})"
                some, others = [], [DeadLetter(place[0], reason, stack=stack_digest(error))]
            alerts += some
            letters += others
        return alerts, letters

    def _decode(self, values: Sequence[tuple[int, bytes | None]]) -> tuple[list[AlertBatch], list[DeadLetter]]:
        alerts: list[AlertBatch] = []
        letters: list[DeadLetter] = []
        blocks = (containers.message(value or b"", place, self.schema_text) for place, value in values)
        buffer_pool, self._buffer_pool = self._buffer_pool, {}  # not to be used again if what follows raises
        for item in batches(blocks, len(values), buffer_pool):
            if isinstance(item, BadPacket):
                letters.append(DeadLetter(item.offset, item.reason, item.status))
            else:
                alerts.append(item)
        self._buffer_pool = buffer_pool if len(buffer_pool) <= MOST_SPARE else {}
        return alerts, letters

    def classify(self, alerts: Sequence[AlertBatch]) -> tuple[pa.RecordBatch, list[DeadLetter]]:
        """Rows of all alerts that the program survives, in the order of their messages, and those on which it fails."""
        parts: list[pa.RecordBatch] = []
        letters: list[DeadLetter] = []
        for batch in alerts:
            self._classify(batch, parts, letters)
        if len(parts) == 1:
            return parts[0], letters
        table = pa.Table.from_batches(parts, self.classifiers.schema).sort_by("offset").combine_chunks()
        return (table.to_batches() or [pa.RecordBatch.from_pylist([], self.classifiers.schema)])[0], letters

    def _classify(self, batch: AlertBatch, parts: list[pa.RecordBatch], letters: list[DeadLetter]) -> None:
        count = len(batch.curves)
        try:
            parts.append(self.classifiers(batch))
        except EdgekitError:
            raise  # a model that cannot be used: not this alert's fault
        except Exception as error:
            if count > 1:  # find the one to blame; the others are sound
                middle = count // 2
                for start, stop in ((0, middle), (middle, count)):
                    part = AlertBatch(
                        batch.survey, batch.curves.take(np.arange(start, stop)), batch.alerts.slice(start, stop - start)
                    )
                    self._classify(part, parts, letters)
                return
            LOG.exception("classifying an alert failed")
            reason = f"classifying failed ({type(error).__name__}: {error})"
            letters.append(DeadLetter(batch.alerts["offset"][0].as_py(), reason, stack=stack_digest(error)))
