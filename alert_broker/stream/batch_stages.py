"""The stages of the pipeline for one batch in flight: decode, classify, publish.

Each method is called by the thread of its stage. They need what `stages` does not know: a registry that may have to be
waited for, the routes and the archive of the configuration, and the statistics.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from alert_broker.stream.archive import Archive
from alert_broker.stream.classifiers import open_all_classifiers
from alert_broker.stream.config import Config
from alert_broker.stream.dead_letters import UNREADABLE, DeadLetter, DeadLetterLimits
from alert_broker.stream.in_flight import InFlight, positions_of, with_positions
from alert_broker.stream.membership import Membership
from alert_broker.stream.outcome import Outcome, ResultWriter
from alert_broker.stream.outputs import Registry
from alert_broker.stream.publication import Owned, Publication
from alert_broker.stream.publish import Publisher
from alert_broker.stream.registry import HttpRegistry, RegistryError, open_registry
from alert_broker.stream.routing import Route, Router
from alert_broker.stream.stages import Stages
from alert_broker.stream.stats import Stats
from alert_broker.stream.unreadable import UnreadableMessage
from alert_broker.work_budget import Budget

LOG = logging.getLogger("edgekit.stream")
REGISTRY_RETRY = 1.0  # seconds between attempts to reach a registry that does not answer


class BatchStages:
    """stopping: is set when no stage should wait for the registry any more. notify: is called with what the user should
    know while models are opened."""

    def __init__(
        self,
        config: Config,
        stats: Stats,
        budget: Budget,
        stopping: threading.Event,
        notify: Callable[[str], None],
    ) -> None:
        self._config, self._stats, self._stopping = config, stats, stopping
        classifiers = open_all_classifiers(config, budget, notify)
        for item in classifiers.opened.values():
            stats.models[item.bundle.manifest.name] = item.bundle.digest
        self._registry = self._open_registry() if config.registry.url else None
        if (scorer := classifiers.cutouts) is not None:
            stats.models[scorer.bundle.manifest.name] = scorer.bundle.digest
            stats.time_also(scorer.seconds)
        schemas = self._registry.schema if self._registry else None
        self._stages = Stages(classifiers, schemas, budget, images=scorer is not None)
        routes = [Route(item.topic, item.where, item.format, item.attach) for item in config.output]
        router = Router(routes, classifiers.schema, registry=self._registry) if routes else None
        if router is not None:
            router.warm_up()
        self._writer = ResultWriter(config, router, self._stages.schema_text)
        self._archive = Archive(Path(config.archive.folder), classifiers.schema) if config.archive.folder else None
        self._limits = DeadLetterLimits(config.dead_letters)
        self._refusal_limits = DeadLetterLimits(config.dead_letters)  # of alerts whose results brokers refuse

    def _open_registry(self) -> Registry:
        return open_registry(
            self._config.registry_url(),
            sleep=self._stopping.wait,
            stopped=self._stopping.is_set,
            seconds=self._config.registry.seconds,
        )

    def decode(self, work: InFlight) -> None:
        values = [message.value() for message in work.batch.messages]
        deadline = time.monotonic() + self._config.registry.seconds
        while True:
            try:
                with self._stats.stage("decode"):
                    work.alerts, work.dead_letters = self._stages.decode(values)
                break
            except RegistryError as error:  # no alert is at fault: wait; fetching is paused meanwhile
                self._wait_for_registry(error, deadline)
        for number, dead_letter in enumerate(work.dead_letters):
            message: Any = work.batch.messages[dead_letter.index]
            if isinstance(message, UnreadableMessage):
                work.dead_letters[number] = DeadLetter(dead_letter.index, message.reason, UNREADABLE)

    def _wait_for_registry(self, error: RegistryError, deadline: float) -> None:
        """Return when decoding may be tried again; raise the error if that is of no use."""
        if self._stopping.is_set():
            raise error
        if isinstance(self._registry, HttpRegistry) and self._registry.blames(error):
            LOG.warning("messages with schema %d become dead letters: %s", error.identifier, error)
            return
        if time.monotonic() > deadline:
            raise error
        LOG.warning("%s; trying again", error)
        self._stopping.wait(REGISTRY_RETRY)

    def classify(self, work: InFlight) -> None:
        classifiers = self._stages.classifiers
        before = classifiers.seconds
        rows, dead_letters = self._stages.classify(work.alerts)
        for stage, seconds in classifiers.seconds.items():
            self._stats.observe(stage, seconds - before[stage])
        if classifiers.cutouts is not None:
            self._stats.cutouts = classifiers.cutouts.outcomes()
        work.dead_letters += dead_letters
        work.index = rows["offset"].to_numpy()
        work.rows = with_positions(rows, work.batch, work.index)
        work.alerts = []

    def publish(self, work: InFlight, membership: Membership, publisher: Publisher) -> None:
        """Archive the rows, and hand results and dead letters to the publisher."""
        batch = work.batch
        with self._stats.stage("route"):
            results = self._writer.results(work)
            outcome = Outcome(work, results, self._config, archived=self._archive is not None)
        publisher.make_room()
        with membership.publishing:
            owned = membership.owned(batch)
            if not owned.any():
                return
            self._limits.check(outcome.dead_letters, owned)
            if self._archive is not None:
                keep = owned[work.index]
                assert work.rows is not None
                self._archive.write(work.rows.filter(pa.array(keep)), positions_of(batch, work.index[keep]))
        messages = outcome.messages(owned)
        account = functools.partial(self._account, outcome, len(outcome.dead_letters), time.monotonic())
        publisher.publish(Publication(batch, messages, outcome.instead, account))

    def _account(self, outcome: Outcome, known: int, started: float, owned: Owned) -> None:
        """known: how many dead letters the batch had before any broker refused a result."""
        self._stats.observe("publish", time.monotonic() - started)
        outcome.account(self._stats, owned)
        self._refusal_limits.check(outcome.dead_letters[known:], owned)
