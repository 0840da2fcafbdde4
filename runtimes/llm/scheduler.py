"""Dynamic SplitFuse: which tokens of which requests go into the next step.

Every step has a budget of tokens. Requests that are answering get one token each, first; prompts fill the rest, cut
into chunks where they do not fit (Holmes et al., DeepSpeed-FastGen, arXiv 2401.08671, section 3). Long prompts
therefore never stop answers, and steps are about equally long.

Neither side starves. If there are more answers than the budget, they take turns; and if answers fill the budget, the
first prompt still gets `LEAST_CHUNK` tokens every `PATIENCE` steps. Interactive prompts go before those of batch work,
and a request's wait counts for it. A request is admitted when the cache has room for its prompt. If the cache is full,
the request that came last and matters least gives its blocks back and waits; it is computed again from its tokens,
which changes none of them, because the engine's results do not depend on the schedule."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from runtimes.llm.engine import Engine, Item
from runtimes.llm.sampling import Sampling, choose

LEAST_CHUNK, PATIENCE = 16, 4  # tokens, steps
AGEING = 256.0  # tokens of prompt that a second of waiting makes up for
BATCH_HANDICAP = 8192.0  # tokens that a prompt of batch work counts longer

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Request:
    """prompt: (tokens,) ids, at least one; most_tokens: of the answer; ends: ids that end the answer; interactive:
    whether somebody waits for it."""

    prompt: npt.NDArray[np.int64]
    most_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    interactive: bool = True


@dataclass(frozen=True, slots=True)
class Produced:
    """What a step gave a request: a token, or, with `finish`, the end of its answer. logits: (vocabulary,) from which
    the token was chosen."""

    request: int
    token: int | None
    finish: Finish | None
    logits: npt.NDArray[np.float32] | None = None


@dataclass(slots=True, eq=False)
class Running:
    """A request on its way. tokens: of the prompt and the answer so far; computed: how many of them the engine has."""

    number: int
    request: Request
    since: float
    tokens: list[int]
    computed: int = 0
    answered: int = 0
    cancelled: bool = False

    @property
    def answering(self) -> bool:
        """Whether the next token of its answer is one step away."""
        return self.computed == len(self.tokens) - 1 and self.answered > 0


class Scheduler:
    """The requests of one engine. budget: tokens of a step, or a function that gives them before each step; clock:
    seconds. All methods belong to one thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        budget: int | Callable[[], int] = 256,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine, self._clock = engine, clock
        self._budget = budget if callable(budget) else lambda: budget
        self._numbers = itertools.count()
        self._running: list[Running] = []  # in the engine; those that are served go to the end
        self._waiting: list[Running] = []
        self._step: list[tuple[Running, int]] = []  # what the step that runs now computes
        self._starved = 0  # steps in which a prompt got nothing
        self.preempted = 0  # how often a request gave its blocks back

    def submit(self, request: Request) -> int:
        """Take a request; return its number. Raises if it can never be answered."""
        of, length = self.engine.architecture, len(request.prompt)
        if not length or request.most_tokens < 1:
            raise EdgekitError(
                f"a prompt of {length} tokens and an answer of {request.most_tokens}; both need at least 1"
            )
        total = length + request.most_tokens
        if total > of.context:
            raise EdgekitError(
                f"{length} tokens of prompt and {request.most_tokens} of answer are {total}, and the model's context "
                f"is {of.context}; shorten one of them"
            )
        if (needed := self.engine.blocks.count(total)) > self.engine.blocks.number:
            raise EdgekitError(
                f"{total} tokens need {needed} blocks, and the cache has {self.engine.blocks.number} of "
                f"{self.engine.blocks.size} tokens; load the model with a longer context"
            )
        number = next(self._numbers)
        self.engine.check(Item(number, request.prompt))
        self._waiting.append(Running(number, request, self._clock(), request.prompt.tolist()))
        return number

    def cancel(self, number: int) -> bool:
        """End a request without an answer; return whether it was still on its way. A request of the step that runs now
        gets nothing from it, and gives its blocks back behind it."""
        for queue in (self._running, self._waiting):
            for item in queue:
                if item.number == number:
                    queue.remove(item)
                    if any(item is other for other, _ in self._step):
                        item.cancelled = True
                    else:
                        self._release(item)
                    return True
        return False

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def __iter__(self) -> Iterator[Produced]:
        """Yield what the requests get, until none is left."""
        while self.busy:
            yield from self.step()

    def step(self, between: Callable[[int], None] | None = None) -> list[Produced]:
        """Run one step of the engine; return what it gave. between: see `Engine.step`; it may submit and cancel."""
        chosen = self._choose(min(max(1, self._budget()), self.engine.rows))
        if not chosen:
            return []
        self._step = chosen
        try:
            return self._run(chosen, between)
        except BaseException:
            for item, _ in chosen:  # a step that failed behind its last layer has appended tokens
                if self.engine.length(item.number) > item.computed:
                    self.engine.truncate(item.number, item.computed)
            raise
        finally:
            self._step = []
            for item, _ in chosen:
                if item.cancelled:
                    self._release(item)

    def _run(self, chosen: Sequence[tuple[Running, int]], between: Callable[[int], None] | None) -> list[Produced]:
        items = [
            Item(
                item.number,
                np.array(item.tokens[item.computed : item.computed + tokens], np.int64),
                logits="last" if item.computed + tokens == len(item.tokens) else "none",
            )
            for item, tokens in chosen
        ]
        logits = self.engine.step(items, between)
        for item, tokens in chosen:
            item.computed += tokens
        produced = []
        for (item, _), rows in zip(chosen, logits, strict=True):
            if len(rows) and not item.cancelled:
                produced += self._answer(item, rows[-1])
        return produced

    def _answer(self, item: Running, logits: npt.NDArray[np.float32]) -> list[Produced]:
        """Choose a request's next token, and end the request if that was its last one."""
        token = choose(logits, item.request.sampling, item.tokens, item.answered)
        item.answered += 1
        if token in item.request.ends:
            found = [Produced(item.number, None, "stop", logits)]
        else:
            item.tokens.append(token)
            found = [Produced(item.number, token, None, logits)]
            if item.answered == item.request.most_tokens:
                found.append(Produced(item.number, None, "length"))
        if found[-1].finish:
            self._running.remove(item)
            self._release(item)
        return found

    # --- which tokens

    def _choose(self, budget: int) -> list[tuple[Running, int]]:
        """Return requests and how many of their tokens to compute, with room for all of them in the cache."""
        chosen: list[tuple[Running, int]] = []
        prompts = sorted((item for item in self._running if not item.answering), key=self._rank)
        starving = self._starved >= PATIENCE
        if starving:
            self._take_prompts(min(LEAST_CHUNK, budget), prompts, chosen)
        served = bool(chosen)
        self._take_answers(budget - sum(tokens for _, tokens in chosen), chosen)
        if not starving:
            answers = len(chosen)
            self._take_prompts(budget - answers, prompts, chosen)
            served = len(chosen) > answers
        self._starved = 0 if served or not (prompts or self._waiting) else self._starved + 1
        return chosen

    def _take_answers(self, left: int, chosen: list[tuple[Running, int]]) -> None:
        """Choose a token each of up to `left` answers; those that are chosen go behind those that are not."""
        taken = {item.number for item, _ in chosen}
        for item in [item for item in self._running if item.answering and item.number not in taken][:left]:
            if item in self._running and self._make_room(item, 1, chosen):
                chosen.append((item, 1))
                self._running.remove(item)
                self._running.append(item)

    def _take_prompts(self, left: int, prompts: Sequence[Running], chosen: list[tuple[Running, int]]) -> None:
        """Choose up to `left` tokens of prompts, of those that have begun and those that wait alike. The first that
        waits for room keeps all others waiting: it would starve if shorter ones took each block that comes free."""
        full = False
        begun = [item for item in prompts if item in self._running]
        for item in sorted([*begun, *self._waiting], key=self._rank):
            if not left:
                break
            if item in self._waiting:
                full = full or not self._admit(item, chosen)
                if full:
                    continue
            tokens = self._fitting(item, min(left, len(item.tokens) - item.computed), chosen)
            if tokens:
                chosen.append((item, tokens))
                left -= tokens

    def _rank(self, item: Running) -> float:
        """Return where a prompt stands: the shortest rest first, less for what it has waited."""
        rest = len(item.tokens) - item.computed
        handicap = 0.0 if item.request.interactive else BATCH_HANDICAP
        return rest + handicap - AGEING * (self._clock() - item.since)

    # --- room in the cache

    def _promised(self, chosen: Sequence[tuple[Running, int]]) -> int:
        return sum(self.engine.blocks.needed(item.number, tokens) for item, tokens in chosen)

    def _room(self, chosen: Sequence[tuple[Running, int]]) -> int:
        return self.engine.blocks.free - self._promised(chosen)

    def _make_room(self, item: Running, tokens: int, chosen: list[tuple[Running, int]]) -> bool:
        """Whether the cache has room for these tokens, if need be after others gave their blocks back."""
        while self.engine.blocks.needed(item.number, tokens) > self._room(chosen):
            victim = self._victim(chosen)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is item:
                return False
        return True

    def _fitting(self, item: Running, tokens: int, chosen: list[tuple[Running, int]]) -> int:
        """Return how many of these tokens of an admitted prompt fit now; nobody gives blocks back for them."""
        while tokens and self.engine.blocks.needed(item.number, tokens) > self._room(chosen):
            tokens = max(0, tokens - self.engine.blocks.size)
        return tokens

    def _victim(self, chosen: Sequence[tuple[Running, int]]) -> Running | None:
        """Return who gives its blocks back: batch work before interactive, then who came last."""
        busy = {item.number for item, _ in chosen}
        others = [item for item in self._running if item.number not in busy]
        return max(others, key=lambda item: (not item.request.interactive, item.since, item.number), default=None)

    def _preempt(self, item: Running) -> None:
        self._running.remove(item)
        self._release(item)
        item.computed = 0
        self._waiting.append(item)
        self.preempted += 1

    def _admit(self, item: Running, chosen: Sequence[tuple[Running, int]]) -> bool:
        """Begin a request if the cache has room for all that it has now: a chunk of a prompt that does not fit whole
        would be given back later."""
        if self.engine.blocks.count(len(item.tokens) + 1) > self._room(chosen) - self._owed():
            return False
        self._waiting.remove(item)
        item.computed = self.engine.reuse(item.number, np.array(item.tokens, np.int64))
        self._running.append(item)
        return True

    def _owed(self) -> int:
        """Return the blocks that admitted prompts still need."""
        return sum(
            self.engine.blocks.needed(item.number, len(item.tokens) - item.computed)
            for item in self._running
            if not item.answering
        )

    def _release(self, item: Running) -> None:
        if item.number in self.engine.blocks.tables:
            self.engine.remove(item.number)
