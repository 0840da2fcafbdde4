"""A batch that is being published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from confluent_kafka import KafkaError

from alert_broker.stream.message_batch import MessageBatch
from alert_broker.stream.sender import Outgoing, Refused

Owned = npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Publication:
    """A batch to be published. instead: returns the messages to send in place of messages that no broker would ever
    accept. account: is called once the outcome is final, with (messages,) whether this member still owns the partition
    of each message."""

    batch: MessageBatch
    messages: list[Outgoing]
    instead: Callable[[Refused], Sequence[Outgoing]]
    account: Callable[[Owned], None]
    unanswered: int = 0  # messages without a delivery report
    failed: list[tuple[Outgoing, KafkaError]] = field(default_factory=list)
