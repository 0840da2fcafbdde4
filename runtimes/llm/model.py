"""A language model as a user has it: text in, text out.

import edgekit

model = edgekit.llm.load("smollm2")
for text in model.chat([{"role": "user", "content": "Which star is nearest to us?"}]):
    print(text, end="")
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import plugins
from edgekit.errors import EdgekitError
from edgekit.importers import downloads
from runtimes.llm.answers import Answer, Token, log_softmax, scored
from runtimes.llm.architecture import Model
from runtimes.llm.blocks import blocks_for
from runtimes.llm.chat import Message, Run, conversation
from runtimes.llm.compression.job import compress as compress
from runtimes.llm.constraint import Constraint, Grammars
from runtimes.llm.engine import Engine, Ids, Item
from runtimes.llm.items import best_items
from runtimes.llm.lookup import MOST_DRAFTS
from runtimes.llm.request import Finish, Produced, Request
from runtimes.llm.sampling import Sampling
from runtimes.llm.scheduler import Scheduler
from runtimes.llm.source import Source, open_source
from runtimes.llm.tokenizer import TextStream, Tokenizer

CONTEXT = 4096  # tokens of the cache, unless the model's own context is shorter
CHUNK = 256  # tokens of a step
MOST_ANSWERS, MOST_BEST = 1024, 1000  # of a prompt; tokens with logprobs beside the one that was chosen


@dataclass(frozen=True, slots=True)
class Perplexity:
    """value: e to the mean of -log p of each token but the first of each window; tokens: how many these are."""

    value: float
    tokens: int


class LanguageModel:
    """A model, its tokenizer and an engine with a cache of `context` tokens. One thread may use it at a time."""

    def __init__(self, source: Source, engine: Engine, context: int) -> None:
        self.source, self.engine, self.context = source, engine, context
        self.tokenizer = source.tokenizer
        self._scheduler = Scheduler(engine, budget=CHUNK)
        self._pending: dict[int, _Pending] = {}  # what each answer that has begun has not taken yet
        self._grammars: Grammars | None = None

    @property
    def name(self) -> str:
        return self.source.name

    def complete(
        self,
        prompt: str,
        *,
        most_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        drafts: int = MOST_DRAFTS,
    ) -> Iterator[str]:
        """Yield the text that follows the prompt, piece by piece. stop: texts that end it; they are not part of it;
        json_schema, regex: the text is JSON of this schema, or matches this regular expression; a text that has
        `most_tokens` ends before it is complete; drafts: the most tokens that a step may guess and verify, 0 for none:
        on the native engine they change the speed and no token."""
        request = self._request(self.tokenizer.encode(prompt), most_tokens, sampling, json_schema, regex, drafts)
        yield from self._answer(request, stop)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        most_tokens: int = 512,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        drafts: int = MOST_DRAFTS,
    ) -> Iterator[str]:
        """Yield the assistant's next message, piece by piece. messages: each with role and content; the other options
        are those of `complete`."""
        prompt = self.chat_prompt(messages)
        yield from self._answer(self._request(prompt, most_tokens, sampling, json_schema, regex, drafts), stop)

    def answers(
        self,
        prompt: str,
        *,
        n: int = 1,
        logprobs: int = 0,
        most_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        drafts: int = MOST_DRAFTS,
    ) -> list[Answer]:
        """Return `n` whole answers to one prompt, which is computed once. The seed of the first is that of `sampling`,
        and each other one's is the next number. logprobs: of how many of the most probable tokens the log probability
        is wanted, beside that of the chosen one; the other options are those of `complete`."""
        if not 1 <= n <= MOST_ANSWERS:
            raise EdgekitError(f"n = {n}; expected 1 to {MOST_ANSWERS} answers")
        if not 0 <= logprobs <= MOST_BEST:
            raise EdgekitError(f"logprobs = {logprobs}; expected 0 to {MOST_BEST}")
        request = self._request(self.tokenizer.encode(prompt), most_tokens, sampling, json_schema, regex, drafts)
        first = request.sampling
        if n > 1 and first.temperature == 0:
            raise EdgekitError(f"n = {n} with temperature = 0 would give one answer {n} times; set a temperature")
        requests = [replace(request, sampling=first.for_answer(at)) for at in range(n)]
        texts = [StoppingText(self.tokenizer, stop) for _ in requests]
        with contextlib.ExitStack() as stack:
            numbers: list[int] = []
            for item in requests:
                leader = numbers[0] if numbers else None
                numbers.append(stack.enter_context(self._submitted(item, leader, logprobs)))
            return [self._whole(number, text) for number, text in zip(numbers, texts, strict=True)]

    def best_items(
        self, prompt: str, items: Sequence[str | Sequence[int]], *, most: int = 1
    ) -> list[tuple[int, float]]:
        """Return the index and the log probability of the `most` most probable items of a catalogue behind a prompt,
        the best first. items: texts, in which the text of a control token becomes that token, or token ids; none may be
        the beginning of another one."""
        ids = [
            self.tokenizer.encode(item, special=True, begin=False).tolist() if isinstance(item, str) else list(item)
            for item in items
        ]
        return best_items(self.engine, self.tokenizer.encode(prompt), ids, most)

    def chat_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), run: Run | None = None
    ) -> Ids:
        """Return the tokens of a conversation, as the model's chat template writes it, up to the assistant's next
        message. tools: descriptions of functions for the template; run: calls the template's code in a confined
        process."""
        text = conversation(
            self._template(),
            messages,
            str(self.source.path),
            guard=self.tokenizer.guard,
            tools=tools,
            run=run,
            **self._names(),
        )
        return self.tokenizer.encode(text, special=True, begin=False)

    def close(self) -> None:
        """Free the engine's memory. The model cannot be used any more."""
        self.engine.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def perplexity(
        self, text: str, window: int = 1024, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Perplexity:
        """Return how well the model predicts a text. window: tokens that are read without the ones before, at most the
        cache's; progress: is told the tokens that are done, and all."""
        if not 2 <= window <= self.context:
            raise EdgekitError(f"window = {window}; expected 2 to {self.context}, the tokens of the cache")
        ids = self.tokenizer.encode(text, begin=False)
        total, number = 0.0, 0
        for start in range(0, len(ids), window):
            part = ids[start : start + window]
            if len(part) > 1:
                chances = self._log_probabilities(part)
                total -= float(chances.sum())
                number += len(chances)
            progress(min(start + window, len(ids)), len(ids))
        if not number:
            raise EdgekitError(f"a text of {len(ids)} tokens; perplexity needs at least 2")
        return Perplexity(float(np.exp(total / number)), number)

    def _log_probabilities(self, ids: Ids) -> Any:
        """Return (tokens - 1,) log p of each token after those before it."""
        found, sequence = [], -1
        chunk = min(CHUNK, self.engine.rows)
        try:
            for start in range(0, len(ids) - 1, chunk):
                part = ids[start : min(start + chunk, len(ids) - 1)]
                logprobs = log_softmax(self.engine.step([Item(sequence, part, logits="all")])[0])
                found.append(logprobs[np.arange(len(part)), ids[start + 1 : start + 1 + len(part)]])
        finally:
            if sequence in self.engine.blocks.tables:
                self.engine.remove(sequence)
        return np.concatenate(found)

    def _request(
        self,
        prompt: Ids,
        most_tokens: int,
        sampling: Sampling | None,
        json_schema: Mapping[str, Any] | None,
        regex: str | None,
        drafts: int,
    ) -> Request:
        if drafts < 0:
            raise EdgekitError(f"drafts = {drafts}; expected 0 (none) or more tokens")
        return Request(
            prompt,
            most_tokens,
            sampling or Sampling(),
            self.tokenizer.ends,
            drafts=drafts,
            constraint=self._constraint(json_schema, regex),
        )

    def _constraint(self, json_schema: Mapping[str, Any] | None, regex: str | None) -> Callable[[], Constraint] | None:
        if json_schema is None and regex is None:
            return None
        if json_schema is not None and regex is not None:
            raise EdgekitError("a JSON schema and a regular expression are given; an answer can obey one of them")
        if self._grammars is None:  # once, because it reads the whole vocabulary
            self._grammars = Grammars(self.tokenizer)
        return self._grammars.regex(regex) if regex is not None else self._grammars.json_schema(json_schema or {})

    def _answer(self, request: Request, stop: Sequence[str]) -> Iterator[str]:
        text = StoppingText(self.tokenizer, stop)
        with self._submitted(request) as number:
            while not text.stopped and isinstance(item := self._next(number), Token):
                if piece := text.add(item.id):
                    yield piece
            if piece := text.end():
                yield piece

    def _whole(self, number: int, text: StoppingText) -> Answer:
        """Return an answer when it has ended."""
        pieces, tokens = [], []
        while not text.stopped and isinstance(item := self._next(number), Token):
            tokens.append(item)
            pieces.append(text.add(item.id))
        pieces.append(text.end())
        return Answer("".join(pieces), "length" if not text.stopped and item == "length" else "stop", tokens)

    @contextlib.contextmanager
    def _submitted(self, request: Request, leader: int | None = None, logprobs: int | None = None) -> Iterator[int]:
        number = self._scheduler.submit(request, leader)
        self._pending[number] = _Pending(logprobs)
        try:
            yield number
        finally:
            self._scheduler.cancel(number)
            del self._pending[number]

    def _next(self, number: int) -> Token | Finish:
        """Return what an answer gets next. Answers that have begun share the steps."""
        while not self._pending[number].items:
            for item in self._scheduler.step():
                self._pending[item.request].add(item)
        found = self._pending[number].items.popleft()
        if isinstance(found, EdgekitError):
            raise found
        return found

    def _template(self) -> str:
        if not self.source.template:
            raise EdgekitError(f"{self.source.path}: the model has no chat template; use `edgekit llm complete`")
        return self.source.template

    def _names(self) -> dict[str, str]:
        named = {"bos_token": self.tokenizer.bos, "eos_token": self.tokenizer.eos}
        return {name: "" if number is None else self.tokenizer.text_of(number) for name, number in named.items()}


@dataclass(slots=True)
class _Pending:
    """What an answer got and has not taken. logprobs: of how many tokens; None: not even of the chosen one. The logits
    themselves are not kept, because they are as long as the vocabulary."""

    logprobs: int | None
    items: deque[Token | Finish | EdgekitError] = field(default_factory=deque)

    def add(self, produced: Produced) -> None:
        if produced.token is None:
            assert produced.finish is not None
            self.items.append(produced.error or produced.finish)
        elif self.logprobs is None or produced.logits is None:
            self.items.append(Token(produced.token, 0.0, ()))
        else:
            self.items.append(scored(produced.logits, produced.token, self.logprobs))


class StoppingText:
    """The text of tokens that come one by one, until a text that ends it. What may be the beginning of such a text is
    held back until the next token."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        if not all(stop):
            raise EdgekitError("a stop text is empty; expected at least one character")
        self._stream, self._stop = TextStream(tokenizer), stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that is certain by now."""
        self._held += self._stream.add(token)
        if ends := [at for text in self._stop if (at := self._held.find(text)) >= 0]:
            self.stopped = True
            found, self._held = self._held[: min(ends)], ""
            return found
        begun = max((_begun(self._held, text) for text in self._stop), default=0)
        found = self._held[: len(self._held) - begun]
        self._held = self._held[len(found) :]
        return found

    def end(self) -> str:
        """Return what was held back, if nothing has ended the text."""
        return "" if self.stopped else self._held + self._stream.end()


def _begun(text: str, stop: str) -> int:
    """Return how many of the last characters are the beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def load(name: str | Path, *, engine: str = "native", context: int | None = None, **options: Any) -> LanguageModel:
    """Load a model. name: a .gguf file, a folder that transformers saved, or a model that `edgekit models get` has
    installed; engine: "native" or "torch" or one that another package adds; context: tokens of the cache, at most the
    model's own; options: of the engine, such as kv="int8" or threads=2. The native engine stores the matrices of a
    folder in 8 bits (Q8_0) unless the option says weights="kept"."""
    return from_source(open_source(downloads.find(name)), engine=engine, context=context, **options)


def from_source(source: Source, *, engine: str, context: int | None, **options: Any) -> LanguageModel:
    """Load a model that was found and described already; the options are those of `load`."""
    model = source.model
    longest = model.architecture.context
    tokens = min(CONTEXT, longest) if context is None else context
    if not 1 <= tokens <= longest:
        raise EdgekitError(f"context = {tokens}; expected 1 to {longest}, the model's own")
    if source.folder and engine == "native":
        options.setdefault("weights", "q8_0")
    opened = open_engine(engine, model, {"blocks": blocks_for(tokens), **options})
    return LanguageModel(source, opened, tokens)


def open_engine(name: str, model: Model, options: Mapping[str, Any]) -> Engine:
    opener = plugins.load("edgekit.engines", name, _problem_with)
    try:
        opened: Engine = opener(model, **options)
    except TypeError as error:
        raise EdgekitError(f"the engine {name!r} does not take these options: {error}") from None
    return opened


def _problem_with(opener: Any, name: str) -> str:
    if not (isinstance(opener, type) and issubclass(opener, Engine)):
        return "it is no class that inherits runtimes.llm.engine.Engine"
    return ""
