"""The daemon's models: loaded when somebody asks for them, if their memory fits, and dropped when nobody does."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Literal

from edgekit.errors import unknown
from edgekit.importers import downloads
from edgekit.importers.api import open_to_run
from edgekit.session import Job, open_session
from runtimes.daemon import placement
from runtimes.daemon.admission import Admission, Needs, of_bundle, of_language
from runtimes.daemon.arbiter import Arbiter
from runtimes.daemon.batching import BatchLoop
from runtimes.daemon.config import ModelSettings, ServeConfig, Task
from runtimes.daemon.language import AnswerQueue
from runtimes.daemon.refusal import RefusedError, from_error
from runtimes.daemon.stats import Stats
from runtimes.daemon.templates import TemplateProcess
from runtimes.llm.constraint import Grammars
from runtimes.llm.model import CONTEXT, LanguageModel, from_source
from runtimes.llm.source import Source, open_source

LOG = logging.getLogger("edgekit.serve")
ROWS = 512  # tokens of a step, for which an engine has memory by default
LOOK_SECONDS = 0.5  # between looks for idle models
State = Literal["not loaded", "loading", "ready", "failed"]


class Language:
    """A language model that is loaded."""

    def __init__(self, model: LanguageModel, queue: AnswerQueue) -> None:
        self.model, self.queue = model, queue
        self.templates = TemplateProcess()
        self._grammars: Grammars | None = None
        # of a text that can fit: no token has more bytes than the longest
        self.most_characters = model.context * max(
            len(model.tokenizer.bytes_of(number)) for number in range(len(model.tokenizer))
        )

    def grammars(self) -> Grammars:
        """Return what makes rules for answers. It takes seconds the first time, because it reads the vocabulary."""
        if self._grammars is None:
            self._grammars = Grammars(self.model.tokenizer)
        return self._grammars

    def close(self) -> None:
        self.queue.close()
        self.templates.close()
        self.model.close()


class Tensors:
    """A bundle that is loaded."""

    def __init__(self, queue: BatchLoop) -> None:
        self.queue = queue

    def close(self) -> None:
        self.queue.close()


@dataclass(slots=True, eq=False)
class Entry:
    """A model of the configuration. users: requests that need it now; since: monotonic seconds when the last of them
    ended; old: the configuration has changed, so that it is dropped when its last request ends."""

    name: str
    settings: ModelSettings
    task: Task
    state: State = "not loaded"
    loaded: Language | Tensors | None = None
    needs: Needs | None = None
    users: int = 0
    since: float = field(default_factory=time.monotonic)
    error: str = ""
    old: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Models:
    """All models. Its methods belong to the event loop."""

    def __init__(self, config: ServeConfig, stats: Stats, admission: Admission | None = None) -> None:
        self._config, self._stats = config, stats
        self._admission = admission or Admission(config.server.memory)
        self._loading = asyncio.Lock()  # one at a time, so that the free memory is known
        self._entries = {name: _entry(name, settings) for name, settings in config.models.items()}
        self._leaving: list[Entry] = []
        # every engine that can be configured runs on the CPU
        self.placement = placement.choose("cpu", divisible=True, alerts=bool(config.alerts.config))
        # of the language models; bundles on a CPU have threads of their own
        self.arbiter = Arbiter(failed=self._job_failed)
        self._stopped = Event()
        self._thread = Thread(target=self._run_steps, name="edgekit-arbiter", daemon=True)
        self._thread.start()

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def find(self, name: str, task: Task | None = None) -> Entry:
        """Return a model by its name. Raises RefusedError if there is none, or if it is for other requests."""
        entry = self._entries.get(name)
        if entry is None:
            error = unknown("model", name[:80], self._entries)
            raise RefusedError(404, str(error), code="model_not_found", parameter="model")
        if task is not None and entry.task != task:
            where = "/v1/chat/completions or /v1/completions" if entry.task == "language" else "/v2/models/NAME/infer"
            raise RefusedError(400, f"the model {name!r} answers at {where}", parameter="model")
        return entry

    @asynccontextmanager
    async def language(self, name: str) -> AsyncIterator[Language]:
        """Load a language model if need be, and keep it while the block runs."""
        async with self._using(self.find(name, "language")) as loaded:
            assert isinstance(loaded, Language)
            yield loaded

    @asynccontextmanager
    async def tensors(self, name: str) -> AsyncIterator[Tensors]:
        """Load a bundle if need be, and keep it while the block runs."""
        async with self._using(self.find(name, "tensors")) as loaded:
            assert isinstance(loaded, Tensors)
            yield loaded

    async def load_first(self) -> None:
        """Load the models that are to be loaded at the start."""
        for entry in list(self._entries.values()):
            if entry.settings.load == "at-start":
                async with self._using(entry):
                    pass

    def reload(self, config: ServeConfig) -> None:
        """Take another configuration. A model whose settings have changed is dropped when its last request ends."""
        self._config = config
        self._admission = Admission(config.server.memory)
        for name, entry in list(self._entries.items()):
            if config.models.get(name) != entry.settings:
                entry.old = True
                self._leaving.append(self._entries.pop(name))
        for name, settings in config.models.items():
            if name not in self._entries:
                self._entries[name] = _entry(name, settings)

    def taken(self) -> int:
        """Return the bytes that the loaded models need."""
        return sum(entry.needs.total for entry in self._all() if entry.loaded is not None and entry.needs is not None)

    def end_all(self, error: RefusedError) -> None:
        """End all answers with an error."""
        for entry in self._all():
            if entry.loaded is not None:
                entry.loaded.queue.end_all(error)

    async def drop_idle(self) -> None:
        """Drop models that nobody has used for their time, as long as this runs."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            now = time.monotonic()
            for entry in list(self._all()):
                idle = entry.settings.idle_seconds
                if entry.old or (idle and now - entry.since > idle):
                    await self._drop(entry)

    async def close(self) -> None:
        for entry in list(self._all()):
            entry.users = 0
            await self._drop(entry)
        self._stopped.set()
        self.arbiter.wake()
        await asyncio.to_thread(self._thread.join)

    def _run_steps(self) -> None:
        placement.lower_this_thread(self.placement.nice)
        self.arbiter.run(self._stopped.is_set)

    def _job_failed(self, job: Job, error: Exception) -> None:
        """Say so to the model whose job has failed; the next request loads it again. The arbiter's thread calls
        this."""
        for entry in self._all():
            if isinstance(entry.loaded, Language) and entry.loaded.queue.job is job:
                entry.loaded.queue.give_up(error)

    def stuck(self, seconds: float) -> str:
        """Return which model has computed one step for longer than this; "" if none has."""
        now = time.monotonic()
        for entry in self._all():
            began = None if entry.loaded is None else entry.loaded.queue.step_began
            if began is not None and now - began > seconds:
                return f"the model {entry.name} has computed one step for {now - began:.0f} s"
        return ""

    # --- loading

    def _all(self) -> list[Entry]:
        return [*self._entries.values(), *self._leaving]

    @asynccontextmanager
    async def _using(self, entry: Entry) -> AsyncIterator[Language | Tensors]:
        entry.users += 1
        try:
            async with entry.lock:
                if isinstance(entry.loaded, Language) and entry.loaded.queue.broken:
                    broken, entry.loaded = entry.loaded, None
                    await asyncio.to_thread(broken.close)
                if entry.loaded is None:
                    await self._load(entry)
            assert entry.loaded is not None
            yield entry.loaded
        finally:
            entry.users -= 1
            entry.since = time.monotonic()

    async def _load(self, entry: Entry) -> None:
        async with self._loading:
            entry.state, entry.error = "loading", ""
            started = time.monotonic()
            try:
                opened, needs = await asyncio.to_thread(self._opened, entry)
                await self._admit(entry, needs)
                entry.needs = needs
                entry.loaded = await asyncio.to_thread(opened)
            except Exception as error:
                entry.state, entry.needs = "failed", None
                refused = from_error(error, 503)
                entry.error = str(refused)
                LOG.log(
                    logging.WARNING if refused.status != 500 else logging.ERROR,
                    "the model %s cannot be loaded: %s", entry.name, error, exc_info=refused.status == 500,
                )  # fmt: skip
                raise refused from None
        entry.state = "ready"
        self._stats.add(entry.name, loads=1)
        LOG.info("loaded %s in %.1f s: it needs %s", entry.name, time.monotonic() - started, entry.needs)

    async def _admit(self, entry: Entry, needs: Needs) -> None:
        """Make room by dropping idle models, the longest idle first. Raises RefusedError if that is not enough."""
        others = sorted(self._all(), key=lambda other: other.since)
        while self._admission.missing(needs, self.taken()):
            idle = next((other for other in others if other.loaded is not None and not other.users), None)
            if idle is None:
                raise self._admission.refusal(entry.name, needs, self.taken())
            await self._drop(idle)

    async def _drop(self, entry: Entry) -> None:
        if entry.users:
            return
        loaded, entry.loaded = entry.loaded, None
        if loaded is not None:
            entry.state = "not loaded"
            await asyncio.to_thread(loaded.close)
            LOG.info("dropped %s", entry.name)
        if entry in self._leaving and not entry.users:
            self._leaving.remove(entry)

    def _opened(self, entry: Entry) -> tuple[Callable[[], Language | Tensors], Needs]:
        """Read what a model's file says; return what loads it, and the memory that it needs."""
        settings = entry.settings
        most, stats, arbiter = self._config.limits.queue, self._stats, self.arbiter
        nice, threads = self.placement.nice, settings.threads or self.placement.threads
        if entry.task == "language":
            source = open_source(downloads.find(settings.path))
            context = settings.context or min(CONTEXT, source.model.architecture.context)
            needs = of_language(
                source.model, engine=settings.engine, kv=settings.kv, context=context, rows=ROWS, folder=source.folder
            )

            def language() -> Language:
                # an engine starts its threads here; they get the priority of the thread that starts them
                with ThreadPoolExecutor(1, initializer=placement.lower_this_thread, initargs=(nice,)) as low:
                    model = low.submit(_language_model, source, settings, context, threads).result()
                return Language(model, AnswerQueue(entry.name, model.engine, arbiter, most=most, stats=stats))

            return language, needs
        bundle = open_to_run(settings.path)

        def tensors() -> Tensors:
            session = open_session(bundle, settings.runtime, threads=settings.threads or None)
            return Tensors(
                BatchLoop(
                    entry.name, session, batch=settings.batch, seconds=settings.batch_seconds, most=most, stats=stats
                )
            )

        return tensors, of_bundle(bundle, settings.batch)


def _language_model(source: Source, settings: ModelSettings, context: int, threads: int) -> LanguageModel:
    options: dict[str, str | int] = {"kv": settings.kv} if settings.kv else {}
    options |= {"threads": threads} if settings.engine != "torch" else {}
    return from_source(source, engine=settings.engine, context=context, **options)


def _entry(name: str, settings: ModelSettings) -> Entry:
    return Entry(name, settings, settings.category)
