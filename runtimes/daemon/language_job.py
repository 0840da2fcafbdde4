"""The job of a language model: the requests of its scheduler, a step at a time.

Where the engine can stop between two layers, more urgent work runs there, and waits for one layer at most. What cannot
stop, one layer or else the whole step, is kept so short that it ends within the slack of the real-time work. A step
with answers in it is also kept short enough for the time that may pass between two of their tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from edgekit.errors import EdgekitError
from edgekit.session import NextStep, Priority
from runtimes.daemon.step_time import StepTime, shape_of
from runtimes.llm.engine import Engine
from runtimes.llm.request import Produced, StepShape
from runtimes.llm.scheduler import Scheduler

LEARNING = 0.1  # share of the newest step in what is remembered of the seconds of a token


class TokenTime:
    """The seconds of a token in the last steps: all their seconds by all their tokens, so that a step of many tokens
    counts for all of them."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds += seconds - LEARNING * self._seconds
        self._tokens += tokens - LEARNING * self._tokens

    @property
    def mean(self) -> float:
        """Return 0 before the first step."""
        return self._seconds / self._tokens if self._tokens else 0.0


class LanguageJob:
    """The requests to one language model. deliver: gets what a step gave them, in the arbiter's thread; prepare: is
    called there before each step and in its pauses, and may submit to `scheduler` and cancel; between_tokens: seconds
    that may pass between two tokens of an answer while prompts are computed, None for any; budget: the most tokens of a
    step; slack: the arbiter's; clock: the arbiter's, in seconds."""

    def __init__(
        self,
        name: str,
        engine: Engine,
        *,
        deliver: Callable[[Sequence[Produced]], None],
        prepare: Callable[[], None] = lambda: None,
        between_tokens: float | None = 0.05,
        budget: int = 512,
        slack: Callable[[], float] = lambda: math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if between_tokens is not None and not between_tokens > 0:
            raise EdgekitError(f"{name}: between_tokens = {between_tokens} seconds; expected a number above 0")
        if budget < 1:
            raise EdgekitError(f"{name}: a budget of {budget} tokens; expected at least 1")
        self.name, self.engine, self.time = name, engine, StepTime()
        self._deliver, self._prepare, self._device_slack = deliver, prepare, slack
        self._between_tokens, self._most = between_tokens, min(budget, engine.rows)
        self.scheduler = Scheduler(engine, budget=self.budget, clock=clock, measured=self._learn)
        # a step without a prompt has few tokens, each of which takes several times as long as one of a prompt
        self._prompt_time, self._answer_time = TokenTime(), TokenTime()
        self._ahead = 0, 0  # tokens of prompts and answers that a new request waits for, by the last look

    def next_step(self, *, batch: bool) -> NextStep | None:
        self.scheduler.holds_batch = not batch
        self._look()
        interactive = self.scheduler.interactive
        if not interactive and not (batch and self.scheduler.busy):
            return None
        answers, prompt = self.scheduler.lengths()
        shape = shape_of(self.budget() if any(self._ahead) else max(1, len(answers)), answers, prompt)
        return NextStep(Priority.INTERACTIVE if interactive else Priority.BATCH, self.time.seconds(shape))

    def run(self, between: Callable[[], None]) -> None:
        def pause(layer: int) -> None:
            self._look()
            between()

        self._deliver(self.scheduler.step(pause if self.engine.divisible else None))
        self._look()

    def slack(self) -> float:
        return math.inf

    def backlog(self) -> float:
        prompts, answers = self._ahead
        prompt_seconds, answer_seconds = self._prompt_time.mean, self._answer_time.mean
        return (prompt_seconds or answer_seconds) * prompts + (answer_seconds or prompt_seconds) * answers

    def budget(self) -> int:
        """Return the most tokens of the next step."""
        answers, prompt = self.scheduler.lengths()
        seconds = math.inf if self._between_tokens is None or not answers else self._between_tokens
        # one layer may take half of the slack, so that a device that becomes half as fast misses nothing; a whole step
        # may take all of it, because half of it would cost a fifth of the tokens
        parts = self.engine.architecture.layers / 2 if self.engine.divisible else 1
        seconds = min(seconds, parts * self._device_slack())
        return self._most if seconds == math.inf else self.time.budget(seconds, answers, prompt, self._most)

    def _look(self) -> None:
        self._prepare()
        self._ahead = self.scheduler.ahead

    def _learn(self, shape: StepShape, seconds: float) -> None:
        self.time.learn(shape, seconds)
        if (prompt := shape.tokens - shape.sequences) > 0:
            self._prompt_time.add(seconds, prompt + 1)  # the others are answers, one token each
        else:
            self._answer_time.add(seconds, shape.tokens)
