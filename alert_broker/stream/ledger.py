"""The conservation ledger: for every partition, consumed = published + filtered + dead-lettered when nothing is in
flight.

An alert is counted as consumed when it enters the pipeline. It is counted in another column when its outcome is final:
its delivery report has arrived (published, dead-lettered), or no output's filter takes it (filtered). The committed
offset is never after an alert whose outcome is not final.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from threading import Lock
from typing import Any

from edgekit.errors import EdgekitError

Partition = tuple[str, int]  # topic, number


@dataclass(slots=True)
class Entry:
    """The counts of one partition. revoked: alerts that were in flight when the partition went to another consumer,
    which reads them again; they are in no other column. expired: offsets that retention deleted before we read them;
    they were never consumed, and are in no other column either."""

    consumed: int = 0
    published: int = 0
    filtered: int = 0
    dead_lettered: int = 0
    revoked: int = 0
    expired: int = 0

    @property
    def in_flight(self) -> int:
        return self.consumed - self.published - self.filtered - self.dead_lettered


@dataclass(slots=True)
class Ledger:
    """One entry per partition; stages of several threads write to it."""

    entries: dict[Partition, Entry] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def add(
        self,
        partition: Partition,
        *,
        consumed: int = 0,
        published: int = 0,
        filtered: int = 0,
        dead_lettered: int = 0,
        expired: int = 0,
    ) -> None:
        with self._lock:
            entry = self.entries.setdefault(partition, Entry())
            entry.consumed += consumed
            entry.published += published
            entry.filtered += filtered
            entry.dead_lettered += dead_lettered
            entry.expired += expired

    def revoke(self, partition: Partition) -> int:
        """Take the alerts of a partition that are in flight off the ledger; return how many they are."""
        with self._lock:
            entry = self.entries.get(partition, Entry())
            lost = entry.in_flight
            entry.consumed -= lost
            entry.revoked += lost
            return lost

    @property
    def revoked(self) -> int:
        return self.total().revoked

    def copy(self) -> Ledger:
        """The ledger at this moment."""
        with self._lock:
            return Ledger({partition: replace(entry) for partition, entry in self.entries.items()})

    def total(self) -> Entry:
        """The sum over all partitions."""
        with self._lock:
            columns = [asdict(entry) for entry in self.entries.values()]
        return Entry(**{name: sum(column[name] for column in columns) for name in asdict(Entry())})

    def check(self) -> None:
        """Raise unless the counts of every partition add up."""
        for (topic, number), entry in sorted(self.entries.items()):
            if entry.in_flight:
                raise EdgekitError(
                    f"the ledger of {topic}[{number}] does not add up: {entry.consumed} consumed, {entry.published} "
                    f"published + {entry.filtered} filtered + {entry.dead_lettered} dead-lettered; offsets were "
                    "committed only up to the last one whose outcome is final: start again to process the rest"
                )

    def to_json(self) -> dict[str, Any]:
        with self._lock:
            entries = {f"{topic}[{number}]": asdict(entry) for (topic, number), entry in sorted(self.entries.items())}
        total = self.total()
        return {"partitions": entries, "total": asdict(total), "in_flight": total.in_flight, "revoked": total.revoked}
