"""The answers of one language model, between the event loop and the thread of the arbiter.

The event loop gives requests to the model's job. The job gives back tokens in the arbiter's thread, which turns them
into text and tells the event loop. So uvicorn's event loop never waits for a step of the model.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.session import NextStep, Priority
from runtimes.daemon.arbiter import Arbiter, OverloadedError
from runtimes.daemon.language_job import LanguageJob
from runtimes.daemon.refusal import RefusedError, from_error, stopping
from runtimes.daemon.stats import Stats
from runtimes.llm.answers import Token, scored
from runtimes.llm.engine import Engine
from runtimes.llm.model import StoppingText
from runtimes.llm.request import Finish, Produced, Request, StepShape

LOG = logging.getLogger("edgekit.serve")
NUMBERS = itertools.count(1)  # of jobs, in the order in which their models were loaded


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of an answer, and the text that is certain by now."""

    text: str
    tokens: Sequence[Token]


@dataclass(frozen=True, slots=True)
class End:
    """The end of an answer. tokens: of all of it; error: why it has none, or ended early."""

    finish: Finish
    tokens: int
    error: RefusedError | None = None


Event = Piece | End


@dataclass(slots=True, eq=False)
class Pending:
    """An answer on its way. tell: gets its events, in any thread; logprobs: of how many tokens beside the chosen one,
    None for none at all; leader: an answer to the same prompt, which is computed once."""

    request: Request
    text: StoppingText
    tell: Callable[[Event], None]
    logprobs: int | None = None
    leader: Pending | None = None
    number: int | None = None  # of the scheduler
    tokens: int = 0
    since: float = field(default_factory=time.monotonic)
    last: float = 0.0  # when the last token came


class ServedJob(LanguageJob):
    """The job of a model that is served. model: its name in the statistics; failed: is told of a step that raised an
    error. Such a step ends the answers of the model, and not the job: the engine is as it was before the step."""

    def __init__(
        self, name: str, engine: Engine, model: str, stats: Stats, failed: Callable[[Exception], None], **options: Any
    ) -> None:
        super().__init__(name, engine, **options)
        self._model, self._stats, self._failed = model, stats, failed
        self._busy, self._closed = Lock(), False
        self.step_began: float | None = None  # monotonic seconds, while a step runs

    def next_step(self, *, batch: bool) -> NextStep | None:
        with self._busy:
            return None if self._closed else super().next_step(batch=batch)

    def run(self, between: Callable[[], None]) -> None:
        with self._busy:
            if self._closed:
                return
            self.step_began = time.monotonic()
            try:
                super().run(between)
            except Exception as error:
                LOG.error("a step of the model %s has failed", self._model, exc_info=error)
                self._failed(error)
            finally:
                self.step_began = None

    def close(self) -> None:
        """Return when no step runs; none begins any more."""
        with self._busy:
            self._closed = True

    def _learn(self, shape: StepShape, seconds: float) -> None:
        super()._learn(shape, seconds)
        self._stats.step(self._model, seconds, shape.tokens)


class AnswerQueue:
    """The answers of one model. most: how many may wait or run."""

    def __init__(self, name: str, engine: Engine, arbiter: Arbiter, *, most: int, stats: Stats) -> None:
        self.name, self.engine, self.most, self._arbiter, self._stats = name, engine, most, arbiter, stats
        self._answers: dict[int, Pending] = {}  # by the scheduler's number; of the arbiter's thread, until `close`
        self._lock = Lock()  # guards what follows
        self._commands: deque[Callable[[], object]] = deque()
        self._held = 0
        self._closing = False
        self.broken = False  # its job has failed, and the arbiter runs it no more
        # while the model is replaced, the arbiter has the jobs of both
        unique = f"{name} ({next(NUMBERS)})"
        self.job = ServedJob(
            unique, engine, name, stats, self._fail_step, deliver=self._deliver, prepare=self._obey, slack=arbiter.slack
        )
        arbiter.add(self.job)

    @property
    def step_began(self) -> float | None:
        return self.job.step_began

    @property
    def held(self) -> int:
        """How many answers wait or run, those among them that are being prepared or written."""
        return self._held

    @contextmanager
    def room(self, answers: int, priority: Priority) -> Iterator[None]:
        """Keep room in the queue for the answers of a request. Raises RefusedError if it is full, or if the device is
        overloaded."""
        try:
            self._arbiter.admit(priority)
        except OverloadedError as error:
            raise RefusedError(503, str(error), retry_after=error.retry_after) from None
        with self._lock:
            if self._held + answers > self.most:
                raise RefusedError(
                    503,
                    f"the model {self.name!r} has {self._held} answers on their way, and limits.queue is {self.most}; "
                    "try again later",
                    retry_after=1,
                )
            self._held += answers
        try:
            yield
        finally:
            with self._lock:
                self._held -= answers

    def submit(self, pending: Pending) -> None:
        """Begin an answer; its events come from now on."""
        if not self._command(lambda: self._begin(pending)):
            pending.tell(End("failed", 0, stopping()))

    def cancel(self, pending: Pending) -> None:
        """End an answer without an event, and give its blocks back."""
        self._command(lambda: self._forget(pending, "cancelled"))

    def end(self, pendings: Sequence[Pending], error: RefusedError) -> None:
        """End these answers with an error, as far as they have not ended."""
        self._command(lambda: self._fail(pendings, error))

    def end_all(self, error: RefusedError) -> None:
        """End all answers with an error."""
        self._command(lambda: self._fail([*self._answers.values()], error))

    def give_up(self, error: Exception) -> None:
        """Its job has failed outside a step: end all answers. The arbiter's thread calls this."""
        LOG.error("the scheduler of the model %s has failed", self.name, exc_info=error)
        self.broken = True
        self._obey()
        self._fail([*self._answers.values()], from_error(RuntimeError()))

    def close(self) -> None:
        """Take the job from the arbiter; answers that are on their way get an error."""
        with self._lock:
            self._closing = True
        self._arbiter.remove(self.job.name)
        self.job.close()  # from here on, nobody else uses the scheduler
        self._obey()
        self._fail([*self._answers.values()], stopping())

    def _command(self, command: Callable[[], object]) -> bool:
        """Let the arbiter's thread call a function soon; return whether it will."""
        with self._lock:
            if self._closing:
                return False
            self._commands.append(command)
        self._arbiter.wake()
        return True

    # --- in the arbiter's thread

    def _obey(self) -> None:
        while self._commands:
            with self._lock:
                command = self._commands.popleft()
            command()

    def _begin(self, pending: Pending) -> None:
        try:
            leader = None if pending.leader is None else pending.leader.number
            pending.number = self.job.scheduler.submit(pending.request, leader)
        except Exception as error:
            if not isinstance(error, EdgekitError):
                LOG.error("the model %s cannot take a request", self.name, exc_info=error)
            self._tell(pending, End("failed", 0, from_error(error)))
            return
        self._answers[pending.number] = pending
        self._stats.add(self.name, prompt_tokens=len(pending.request.prompt))

    def _deliver(self, produced: Sequence[Produced]) -> None:
        found: dict[int, list[Produced]] = {}
        for item in produced:
            found.setdefault(item.request, []).append(item)
        for number, items in found.items():
            if number in self._answers:  # else it was cancelled within the step
                self._receive(self._answers[number], items)

    def _receive(self, pending: Pending, items: Sequence[Produced]) -> None:
        """Tell an answer what a step gave it. A stop text ends it at once."""
        tokens: list[Token] = []
        text, end = "", None
        for item in items:
            if item.token is None:
                assert item.finish is not None
                error = None if item.error is None else from_error(item.error)
                text += pending.text.end() if error is None else ""
                end = End(item.finish, pending.tokens + len(tokens), error)
                break
            tokens.append(self._token(pending, item))
            text += pending.text.add(item.token)
            if pending.text.stopped:
                end = End("stop", pending.tokens + len(tokens))
                break
        self._note_tokens(pending, len(tokens))
        if tokens or text:
            self._tell(pending, Piece(text, tokens))
        if end is not None:
            self._forget(pending, end.finish if end.error is None else end.error.code)
            self._tell(pending, end)

    def _token(self, pending: Pending, item: Produced) -> Token:
        assert item.token is not None
        if pending.logprobs is None or item.logits is None:
            return Token(item.token, 0.0, ())
        return scored(item.logits, item.token, pending.logprobs)

    def _note_tokens(self, pending: Pending, number: int) -> None:
        if not number:
            return
        now = time.monotonic()
        if pending.last:
            self._stats.observe(self.name, "between_tokens", (now - pending.last) / number, number)
        else:
            self._stats.observe(self.name, "first_token", now - pending.since)
        pending.last = now
        pending.tokens += number
        self._stats.add(self.name, tokens=number)

    def _fail_step(self, error: Exception) -> None:
        self._fail([*self._answers.values()], from_error(RuntimeError()))

    def _fail(self, pendings: Sequence[Pending], error: RefusedError) -> None:
        for pending in pendings:
            if self._forget(pending, error.code):
                self._tell(pending, End("failed", pending.tokens, error))

    def _forget(self, pending: Pending, how: str) -> bool:
        """Take an answer out of the scheduler, and count how it ended; return whether it was on its way."""
        if pending.number is None or self._answers.pop(pending.number, None) is None:
            return False
        self.job.scheduler.cancel(pending.number)
        self._stats.end(self.name, how, time.monotonic() - pending.since)
        return True

    def _tell(self, pending: Pending, event: Event) -> None:
        try:
            pending.tell(event)
        except RuntimeError:  # the event loop has ended
            self._forget(pending, "cancelled")
