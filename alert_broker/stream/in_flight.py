"""A batch on its way through the stages, and the positions of its messages."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.packets import AlertBatch
from alert_broker.stream.archive import Positions
from alert_broker.stream.dead_letters import DeadLetter
from alert_broker.stream.message_batch import MessageBatch


@dataclass(slots=True)
class InFlight:
    """A batch that is being processed. alerts: set by decoding; rows: set by classifying; index: (rows,) the index in
    the batch of each row's message; dead_letters: the messages that have no row."""

    batch: MessageBatch
    alerts: list[AlertBatch] = field(default_factory=list)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    rows: pa.RecordBatch | None = None
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def positions_of(batch: MessageBatch, index: npt.NDArray[np.int64]) -> Positions:
    """Return the positions of these messages of the batch."""
    topics = [topic for topic, _ in batch.partitions]
    numbers = np.array([number for _, number in batch.partitions], np.int64)
    of = batch.partition[index]
    stamps = np.array([batch.messages[k].timestamp()[1] for k in index.tolist()], np.int64)
    return Positions([topics[k] for k in of.tolist()], numbers[of], batch.offset[index], stamps)


def with_positions(rows: pa.RecordBatch, batch: MessageBatch, index: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return the rows with their message's topic and partition in `file`, and its offset in `offset`."""
    texts = pa.array([f"{topic}[{number}]" for topic, number in batch.partitions], pa.string())
    files = texts.take(pa.array(batch.partition[index]))
    for name, column in (("file", files), ("offset", pa.array(batch.offset[index]))):
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows
