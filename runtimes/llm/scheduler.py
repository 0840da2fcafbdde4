"""Dynamic SplitFuse: which tokens of which requests go into the next step.

Every step has a budget of tokens. Requests that are answering get one token each, first; prompts fill the rest, cut
into chunks where they do not fit (Holmes et al., DeepSpeed-FastGen, arXiv 2401.08671, section 3). Long prompts
therefore never stop answers, and steps are about equally long.

Neither side starves. If there are more answers than the budget, they take turns; and if answers fill the budget, the
first prompt still gets `LEAST_CHUNK` tokens every `PATIENCE` steps. Interactive prompts go before those of batch work,
and a request's wait counts for it. A request is admitted when the cache has room for its prompt. If the cache is full,
the request that came last and matters least gives its blocks back and waits; it is computed again from its tokens,
which changes none of them, because the engine's results do not depend on the schedule.

What is left of the budget verifies drafts of answers (`runtimes.llm.lookup`) where they pay."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from runtimes.llm.engine import Engine, Item
from runtimes.llm.lookup import StepTime, worthwhile
from runtimes.llm.request import Finish, Produced, Request, Running, StepShape
from runtimes.llm.sampling import choose

LEAST_CHUNK, PATIENCE = 16, 4  # tokens, steps
AGEING = 256.0  # tokens of prompt that a second of waiting makes up for
LEAST_SHARED = 2  # blocks of a request that shares its prompt: a copy of the last one, and one for its answer
FIRST_ANSWER, ANSWER_LEARNING = 256.0, 0.1  # tokens of an answer before one has ended, and the share of the newest one
BATCH_HANDICAP = 8192.0  # tokens that a prompt of batch work counts longer


class Scheduler:
    """The requests of one engine. budget: tokens of a step, or a function that gives them before each step; clock:
    seconds; measured: is told the shape of each step and its seconds, without the time that other work took between its
    layers. All methods belong to one thread."""

    def __init__(
        self,
        engine: Engine,
        *,
        budget: int | Callable[[], int] = 256,
        clock: Callable[[], float] = time.monotonic,
        measured: Callable[[StepShape, float], None] = lambda shape, seconds: None,
    ) -> None:
        self.engine, self._clock, self._measured = engine, clock, measured
        self.holds_batch = False  # whether requests of batch work wait; they keep their place and their blocks
        self._budget = budget if callable(budget) else lambda: budget
        self._numbers = itertools.count()
        self._running: list[Running] = []  # in the engine; those that are served go to the end
        self._waiting: list[Running] = []
        self._step: list[tuple[Running, int]] = []  # what the step that runs now computes
        self._starved = 0  # steps in which a prompt got nothing
        self._time = StepTime()
        self._answer_tokens = FIRST_ANSWER  # mean tokens of an answer
        self.preempted = 0  # how often a request gave its blocks back
        self.drafted = self.accepted = 0  # tokens of drafts that were verified, and that were right

    def submit(self, request: Request, leader: int | None = None) -> int:
        """Take a request; return its number. Raises if it can never be answered. leader: a request with the same
        prompt, which is computed once for both."""
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
        constraint = None if request.constraint is None else request.constraint()
        first = next((item for item in (*self._running, *self._waiting) if item.number == leader), None)
        item = Running(number, request, self._clock(), request.prompt.tolist(), constraint, first)
        self._waiting.append(item)
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

    @property
    def interactive(self) -> bool:
        """Whether somebody waits for a request."""
        return any(item.request.interactive for item in (*self._running, *self._waiting))

    @property
    def ahead(self) -> tuple[int, int]:
        """Return the tokens that a new request waits for: of interactive prompts, and of the answers of those that have
        not begun, if they become as long as the last ones."""
        prompts = [item for item in (*self._running, *self._waiting) if item.request.interactive and not item.answering]
        answers = sum(min(self._answer_tokens, item.request.most_tokens) for item in prompts if item in self._waiting)
        return sum(len(item.tokens) - item.computed for item in prompts), int(answers)

    def lengths(self) -> tuple[list[int], int]:
        """Return the tokens before each answer's next one, and how many tokens of the next prompt are computed."""
        able = [item for item in self._running if self._may_run(item)]
        prompts = sorted((item for item in able if not item.answering), key=self._rank)
        return [item.computed for item in able if item.answering], prompts[0].computed if prompts else 0

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
                    item.computed = self.engine.truncate(item.number, item.computed)
            raise
        finally:
            self._step = []
            for item, _ in chosen:
                item.draft = []
                if item.cancelled:
                    self._release(item)

    def _run(self, chosen: Sequence[tuple[Running, int]], between: Callable[[int], None] | None) -> list[Produced]:
        items = [self._item(item, tokens) for item, tokens in chosen]
        shape, other = _shape(chosen), 0.0

        def outside(layer: int) -> None:
            nonlocal other
            began = self._clock()
            assert between is not None
            between(layer)
            other += self._clock() - began

        started = self._clock()
        logits = self.engine.step(items, outside if between else None)
        seconds = self._clock() - started - other
        if all(item.answering for item, _ in chosen):  # a prompt is not a draft
            self._time.add(shape.tokens, seconds)
        self._measured(shape, seconds)
        produced = []
        for (item, tokens), rows in zip(chosen, logits, strict=True):
            item.computed += tokens - len(item.draft)
            if len(rows) and not item.cancelled:
                produced += self._verify(item, rows)
        return produced

    def _item(self, item: Running, tokens: int) -> Item:
        ends = item.computed + tokens >= len(item.tokens)
        return Item(
            item.number,
            np.array(item.tokens[item.computed : item.computed + tokens] + item.draft, np.int64),
            logits="all" if item.draft else "last" if ends else "none",
        )

    def _verify(self, item: Running, rows: npt.NDArray[np.float32]) -> list[Produced]:
        """Choose a request's next tokens, as far as its draft is right and one further, and take the rest back."""
        found: list[Produced] = []
        self.drafted += len(item.draft)
        for row, guess in itertools.zip_longest(rows, item.draft):
            found += self._answer(item, row)
            if found[-1].finish:
                self._answer_tokens += ANSWER_LEARNING * (item.answered - self._answer_tokens)
                self._running.remove(item)
                self._release(item)
                return found
            if found[-1].token != guess:
                break
            self.accepted += 1
        if self.engine.length(item.number) > (right := len(item.tokens) - 1):
            right = self.engine.truncate(item.number, right)
        item.computed = right
        return found

    def _answer(self, item: Running, logits: npt.NDArray[np.float32]) -> list[Produced]:
        """Choose a request's next token; say so if that ends its answer."""
        finish: Finish | None = None
        try:
            allowed = None if item.constraint is None else item.constraint.allowed()
            token = choose(logits, item.request.sampling, item.tokens, item.answered, allowed)
            item.answered += 1
            if token in item.request.ends:
                return [Produced(item.number, None, "stop", logits)]
            if item.constraint is not None:
                item.constraint.advance(token)
                finish = "stop" if item.constraint.done else None
        except EdgekitError as error:  # of this request's constraint; the others go on
            return [Produced(item.number, None, "failed", error=error)]
        item.tokens.append(token)
        item.lookup.learn(token)
        if item.answered == item.request.most_tokens and finish is None:
            finish = "length"
        found = Produced(item.number, token, None, logits)
        return [found] if finish is None else [found, Produced(item.number, None, finish)]

    # --- which tokens

    def _choose(self, budget: int) -> list[tuple[Running, int]]:
        """Return requests and how many of their tokens to compute, with room for all of them in the cache."""
        chosen: list[tuple[Running, int]] = []
        able = [item for item in self._running if self._may_run(item)]
        prompts = sorted((item for item in able if not item.answering), key=self._rank)
        waiting = [item for item in self._waiting if self._may_run(item)]
        starving = self._starved >= PATIENCE
        if starving:
            self._take_prompts(min(LEAST_CHUNK, budget), prompts, chosen)
        served = bool(chosen)
        self._take_answers(budget - sum(tokens for _, tokens in chosen), chosen)
        if not starving:
            answers = len(chosen)
            self._take_prompts(budget - answers, prompts, chosen)
            served = len(chosen) > answers
        self._starved = 0 if served or not (prompts or waiting) else self._starved + 1
        self._take_drafts(budget - sum(tokens for _, tokens in chosen), chosen)
        return chosen

    def _may_run(self, item: Running) -> bool:
        return item.request.interactive or not self.holds_batch

    def _take_answers(self, left: int, chosen: list[tuple[Running, int]]) -> None:
        """Choose a token each of up to `left` answers; those that are chosen go behind those that are not."""
        taken = {item.number for item, _ in chosen}
        answers = [item for item in self._running if item.answering and self._may_run(item)]
        for item in [item for item in answers if item.number not in taken][:left]:
            if item in self._running and self._make_room(item, 1, chosen):
                chosen.append((item, 1))
                self._running.remove(item)
                self._running.append(item)

    def _take_drafts(self, left: int, chosen: list[tuple[Running, int]]) -> None:
        """Let the step verify up to `left` tokens of drafts, the most probable ones, as far as they pay. Nobody gives
        blocks back for them."""
        answers = [at for at, (item, _) in enumerate(chosen) if item.answering and left and item.most_drafts > 0]
        drafts = {at: chosen[at][0].lookup.find(chosen[at][0].tokens, chosen[at][0].most_drafts) for at in answers}
        ranked = [(chance, at) for at in answers for chance in chosen[at][0].lookup.chances(drafts[at])]
        ranked.sort(key=lambda found: -found[0])  # stable, so that a draft's tokens stay in order
        number = worthwhile([chance for chance, _ in ranked], sum(tokens for _, tokens in chosen), self._time)
        wanted = [at for _, at in ranked[: min(number, left)]]
        for at in sorted(set(wanted)):
            item, tokens = chosen.pop(at)
            draft = self._fitting(item, tokens + wanted.count(at), chosen) - tokens
            item.draft = drafts[at][: max(0, draft)]
            chosen.insert(at, (item, tokens + len(item.draft)))

    def _take_prompts(self, left: int, prompts: Sequence[Running], chosen: list[tuple[Running, int]]) -> None:
        """Choose up to `left` tokens of prompts, of those that have begun and those that wait alike. The first that
        waits for room keeps all others waiting: it would starve if shorter ones took each block that comes free."""
        full = False
        begun = [item for item in prompts if item in self._running]
        for item in sorted([*begun, *filter(self._may_run, self._waiting)], key=self._rank):
            if not left:
                break
            if item in self._waiting:
                if self._follows(item):
                    continue
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
        before = len(item.request.prompt) - 1  # the last token is computed again, for its logits
        leader = item.leader if item.leader in self._running else None
        if leader is not None and leader.computed < before:
            leader = None
        needed = self.engine.blocks.count(len(item.tokens) + 1) if leader is None else LEAST_SHARED
        while needed > self._room(chosen) - self._owed():
            held = [other for other in self._running if not self._may_run(other)]
            if not held:
                return False
            self._preempt(held[-1])  # else it would keep blocks, and do nothing, for as long as it is held back
        self._waiting.remove(item)
        item.leader = None
        if leader is None:
            item.computed = self.engine.reuse(item.number, np.array(item.tokens, np.int64))
        else:
            self.engine.fork(leader.number, item.number)
            item.computed = self.engine.truncate(item.number, before)
        self._running.append(item)
        return True

    def _follows(self, item: Running) -> bool:
        """Whether a request waits until its leader's prompt is computed."""
        leader = item.leader
        return leader is not None and not leader.answered and (leader in self._running or leader in self._waiting)

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


def _shape(chosen: Sequence[tuple[Running, int]]) -> StepShape:
    pairs = sum(tokens * item.computed + tokens * (tokens + 1) // 2 for item, tokens in chosen)
    return StepShape(sum(tokens for _, tokens in chosen), pairs, len(chosen))
