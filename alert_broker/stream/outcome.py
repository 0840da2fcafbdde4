"""The outcome of each alert of a batch: results and dead letters as messages, and their counts in the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alert_broker.stream.config import Config
from alert_broker.stream.dead_letters import (
    DeadLetter,
    category_of,
    outgoing,
    position_headers,
    stack_digest,
    without_content,
)
from alert_broker.stream.in_flight import InFlight
from alert_broker.stream.routing import Router
from alert_broker.stream.sender import Outgoing, Refused
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError

LOG = logging.getLogger("edgekit.stream")


class ResultWriter:
    """Writes the messages of rows. router: None if results go to no topic."""

    def __init__(self, config: Config, router: Router | None, schema_text: Callable[[int], str] | None) -> None:
        self._router, self._schema_text = router, schema_text
        self._attaches = any(item.attach != "nothing" for item in config.output)

    def results(self, work: InFlight) -> list[Outgoing]:
        """Return the messages of a batch's rows. If the program fails on a row, its alert becomes a dead letter."""
        if self._router is None or len(work.index) == 0:
            return []
        try:
            return self._route(work, self._router)
        except EdgekitError:
            raise
        except Exception:
            LOG.warning("writing the results of a batch failed; each is written alone now", exc_info=True)
        results: list[Outgoing] = []
        good: list[int] = []
        assert work.rows is not None
        for row, index in enumerate(work.index.tolist()):
            alone = InFlight(work.batch, rows=work.rows.slice(row, 1), index=work.index[row : row + 1])
            try:
                results += self._route(alone, self._router)
                good.append(row)
            except Exception as error:
                reason = f"the result cannot be written ({type(error).__name__}: {error})"
                work.dead_letters.append(DeadLetter(index, reason, stack=stack_digest(error)))
        work.rows, work.index = work.rows.take(pa.array(good, pa.int64())), work.index[good]
        return results

    def _route(self, work: InFlight, router: Router) -> list[Outgoing]:
        messages, index = work.batch.messages, work.index.tolist()
        packets = [messages[k].value() or b"" for k in index] if self._attaches else None
        headers = [position_headers(messages[k]) for k in index]
        routed = router(work.rows, packets, self._schema_text)
        return [
            Outgoing(message.topic, message.value, headers[message.row], index[message.row], message.key)
            for message in routed.messages
        ]


class Outcome:
    """The outcome of each alert of a batch. published, dead: (messages,) whether an alert has a result, and whether it
    has a dead letter; an alert may have both until brokers have accepted its result. archived: whether all rows count
    as published, because they go to the archive as well."""

    def __init__(self, work: InFlight, results: list[Outgoing], config: Config, *, archived: bool) -> None:
        self._work, self._results, self._topic = work, results, config.dead_letters.topic
        self.dead_letters = sorted(work.dead_letters, key=lambda dead_letter: dead_letter.index)
        count = len(work.batch)
        assert len(work.index) + len(self.dead_letters) == count
        self.published, self.dead = np.zeros(count, np.bool_), np.zeros(count, np.bool_)
        self.published[work.index if archived else [message.alert_index for message in results]] = True
        self.dead[[dead_letter.index for dead_letter in self.dead_letters]] = True

    def messages(self, owned: npt.NDArray[np.bool_]) -> list[Outgoing]:
        """Return the results and the dead letters of the alerts that this member still owns."""
        results = [message for message in self._results if owned[message.alert_index]]
        return results + [self._outgoing(item) for item in self.dead_letters if owned[item.index]]

    def instead(self, refused: Refused) -> list[Outgoing]:
        """If brokers refuse results for good, their alert becomes a dead letter: one, however many outputs refuse it.
        Return the dead letters to be sent."""
        found = [without_content(message, reason) for message, reason in refused if message.topic == self._topic]
        reasons: dict[int, list[str]] = {}
        for message, reason in refused:
            if message.topic != self._topic and not self.dead[message.alert_index]:
                reasons.setdefault(message.alert_index, []).append(reason)
        for index, texts in reasons.items():
            dead_letter = DeadLetter(index, f"the result cannot be sent: {'; '.join(texts)}")
            self.dead_letters.append(dead_letter)
            self.dead[index] = True
            found.append(self._outgoing(dead_letter))
        return found

    def account(self, stats: Stats, owned: npt.NDArray[np.bool_]) -> None:
        """Write the final outcome of each alert that this member still owns into the ledger and the statistics."""
        batch, published = self._work.batch, self.published & ~self.dead
        columns = {"published": published, "dead_lettered": self.dead, "filtered": ~published & ~self.dead}
        for name, chosen in columns.items():
            for where, number in batch.counts(chosen & owned).items():
                stats.ledger.add(where, **{name: number})
        stats.observe("end-to-end", time.monotonic() - batch.received, int(owned.sum()))
        stats.dead_letters(category_of(item.reason) for item in self.dead_letters if owned[item.index])
        assert self._work.rows is not None
        final = pa.array((owned & ~self.dead)[self._work.index])
        for item in self._work.rows["best_class"].filter(final).drop_null().value_counts().to_pylist():
            stats.classes[item["values"]] += item["counts"]
        stats.progress()

    def _outgoing(self, dead_letter: DeadLetter) -> Outgoing:
        return outgoing(dead_letter, self._work.batch.messages[dead_letter.index], self._topic)
