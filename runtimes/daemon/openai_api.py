"""OpenAI's API: chat completions, completions, embeddings and the list of models."""

from __future__ import annotations

import asyncio
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from edgekit.session import Priority
from runtimes.daemon import embeddings
from runtimes.daemon.access import read_body, require_json
from runtimes.daemon.config import LimitSettings
from runtimes.daemon.fields import parse
from runtimes.daemon.language import AnswerQueue, End, Event, Pending, Piece
from runtimes.daemon.models import Language, Models
from runtimes.daemon.openai_requests import Wanted, chat_request, completion_request
from runtimes.daemon.refusal import RefusedError, late
from runtimes.llm.answers import Token
from runtimes.llm.engine import Ids
from runtimes.llm.model import StoppingText
from runtimes.llm.request import Request as Work
from runtimes.llm.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # what OpenAI writes for a probability of 0
CLOSED = 499  # the status that is counted for a client that has gone
BODY_IN_LOOP = 1 << 16  # bytes of JSON that are parsed in the event loop itself
Chunk = Callable[[int, str, Sequence[Token], str | None], dict[str, Any]]


@dataclass(slots=True)
class Written:
    """All of an answer."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None


class Answers:
    """The answers of one request, on their way from the model's thread into the event loop."""

    def __init__(self, queue: AnswerQueue, pendings: Sequence[Callable[[Callable[[Event], None]], Pending]]) -> None:
        self._queue = queue
        self._events: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        running = asyncio.get_running_loop()

        def tell(index: int, event: Event) -> None:
            running.call_soon_threadsafe(self._events.put_nowait, (index, event))

        self._pendings = [make(partial(tell, index)) for index, make in enumerate(pendings)]

    @contextmanager
    def running(self, receive: Receive) -> Iterator[None]:
        """Begin the answers; when the block ends or the client goes, those that have not ended are cancelled."""
        watch = asyncio.ensure_future(self._watch(receive))
        leader: Pending | None = None
        for pending in self._pendings:
            if leader is None or leader.request.prompt is not pending.request.prompt:
                leader = pending
            else:
                pending.leader = leader
            self._queue.submit(pending)
        try:
            yield
        finally:
            watch.cancel()
            for pending in self._pendings:
                self._queue.cancel(pending)

    async def events(self, until: float) -> AsyncIterator[tuple[int, Event] | None]:
        """Yield the events of all answers, until all have ended; None if the client has gone. until: monotonic seconds
        of the deadline; then those that have not ended end with an error."""
        left = len(self._pendings)
        while left:
            try:
                item = await asyncio.wait_for(self._events.get(), max(0.0, until - time.monotonic()))
            except TimeoutError:
                self._queue.end(self._pendings, late())
                until = math.inf
                continue
            yield item
            if item is None:
                return
            left -= isinstance(item[1], End)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


class OpenAi:
    """The routes. most: bytes of a body."""

    def __init__(self, models: Models, limits: LimitSettings, most: int) -> None:
        self._models, self._limits, self._most = models, limits, most

    async def list_models(self, request: Request) -> Response:
        found = [self._described(name) for name in self._models.entries]
        return JSONResponse({"object": "list", "data": found})

    async def one_model(self, request: Request) -> Response:
        return JSONResponse(self._described(self._models.find(request.path_params["name"]).name))

    def _described(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "edgekit"}

    async def chat(self, request: Request) -> Response:
        wanted = chat_request(await self._body(request), self._limits.answers)

        def prompts(language: Language) -> list[Ids]:
            _check_length(language, sum(len(item["content"]) for item in wanted.messages))
            return [language.model.chat_prompt(wanted.messages, wanted.tools, run=language.templates.run)]

        return Reply(self, wanted.wanted, 1, prompts, _chat_chunk, _chat_answer, "chatcmpl")

    async def complete(self, request: Request) -> Response:
        wanted = completion_request(await self._body(request), self._limits.answers)

        def prompts(language: Language) -> list[Ids]:
            return [_prompt(language, item) for item in wanted.prompts]

        number = len(wanted.prompts)
        return Reply(self, wanted.wanted, number, prompts, _completion_chunk, _completion_answer, "cmpl")

    async def embed(self, request: Request) -> Response:
        name, inputs, packed, deadline = embeddings.request(await self._body(request))
        settings = self._models.find(name, "tensors").settings
        until = embeddings.until(deadline, self._limits.answer_seconds)
        ids = await asyncio.to_thread(embeddings.token_ids, inputs, name, settings)
        async with self._models.tensors(name) as loaded:
            found = await embeddings.vectors(loaded.queue, ids, until)
        return JSONResponse(embeddings.answer(name, found, packed, sum(map(len, ids))))

    async def _body(self, request: Request) -> dict[str, Any]:
        require_json(request)
        content = await read_body(request, self._most, self._limits.body_seconds)
        return parse(content) if len(content) < BODY_IN_LOOP else await asyncio.to_thread(parse, content)

    def language(self, name: str) -> Any:
        return self._models.language(name)

    @property
    def seconds(self) -> float:
        return self._limits.answer_seconds


class Reply(Response):
    """The answer to one request, as a stream of events or whole. Nothing is sent before the first token, so that an
    error before it has its own status. number: of prompts."""

    def __init__(
        self,
        api: OpenAi,
        wanted: Wanted,
        number: int,
        prompts: Callable[[Language], list[Ids]],
        chunk: Callable[..., dict[str, Any]],
        answer: Callable[..., dict[str, Any]],
        prefix: str,
    ) -> None:
        self._api, self._wanted, self._prompts, self._chunk, self._answer = api, wanted, prompts, chunk, answer
        self._number = number * wanted.answers
        self._until = time.monotonic() + min(api.seconds, wanted.deadline or api.seconds)
        self._id, self._created = f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = self._wanted
        priority = Priority.INTERACTIVE if wanted.interactive else Priority.BATCH
        async with self._api.language(wanted.model) as language:
            with language.queue.room(self._number, priority):
                prompts, works = await asyncio.to_thread(self._prepared, language)
                makers = [partial(self._pending, language.model.tokenizer, work) for work in works]
                answers = Answers(language.queue, makers)
                with answers.running(receive):
                    counts = sum(len(prompt) for prompt in prompts)
                    tokenizer = language.model.tokenizer
                    write = self._stream if wanted.stream else self._whole
                    await write(answers, tokenizer, counts, scope, receive, send)

    def _prepared(self, language: Language) -> tuple[list[Ids], list[Work]]:
        """Return the prompts, and the work of each answer. The seed of each answer after the first is the next one."""
        wanted, model = self._wanted, language.model
        prompts = self._prompts(language)
        constraint = None if wanted.schema is None else language.grammars().json_schema(wanted.schema)
        works = []
        for prompt in prompts:
            room = model.context - len(prompt)
            if room < 1 or (wanted.most_tokens or 1) > room:
                raise RefusedError(
                    400,
                    f"the prompt has {len(prompt)} tokens and the answer {wanted.most_tokens or 'at least 1'}; the "
                    f"model's context here is {model.context}",
                    code="context_length_exceeded",
                )
            for number in range(wanted.answers):
                sampling = wanted.sampling.for_answer(number)
                works.append(
                    Work(
                        prompt,
                        wanted.most_tokens or room,
                        sampling,
                        model.tokenizer.ends,
                        wanted.interactive,
                        wanted.drafts,
                        constraint,
                    )
                )
        return prompts, works

    def _pending(self, tokenizer: Tokenizer, work: Work, tell: Callable[[Event], None]) -> Pending:
        text = StoppingText(tokenizer, self._wanted.stop)
        return Pending(work, text, tell, self._wanted.logprobs)

    async def _whole(
        self, answers: Answers, tokenizer: Tokenizer, counts: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        written: dict[int, Written] = {}
        async for item in answers.events(self._until):
            if item is None:
                await Response(status_code=CLOSED)(scope, receive, send)
                return
            index, event = item
            found = written.setdefault(index, Written())
            if isinstance(event, Piece):
                found.text += event.text
                found.tokens += event.tokens
                continue
            if event.error is not None:
                raise event.error
            found.end = event
        choices = [self._answer(index, written[index], tokenizer, self._wanted.logprobs) for index in sorted(written)]
        made = sum(found.end.tokens for found in written.values() if found.end is not None)
        kind = "chat.completion" if self._id.startswith("chat") else "text_completion"
        await JSONResponse({**self._head(kind), "choices": choices, "usage": _usage(counts, made)})(
            scope, receive, send
        )

    async def _stream(
        self, answers: Answers, tokenizer: Tokenizer, counts: int, scope: Scope, receive: Receive, send: Send
    ) -> None:
        chat = self._id.startswith("chat")
        kind = "chat.completion.chunk" if chat else "text_completion"
        head, begun, made = self._head(kind), set[int](), 0
        async for item in answers.events(self._until):
            if item is None:
                return
            index, event = item
            if isinstance(event, End) and event.error is not None:
                if not begun:
                    raise event.error
                await _send_event(send, event.error.as_openai())
                await send({"type": "http.response.body", "body": b""})
                return
            if not begun:
                await _begin(send)
            first = index not in begun
            begun.add(index)
            finish = event.finish if isinstance(event, End) else None
            made += event.tokens if isinstance(event, End) else 0
            text, tokens = (event.text, event.tokens) if isinstance(event, Piece) else ("", ())
            choice = self._chunk(index, text, tokens, finish, first, tokenizer, self._wanted.logprobs)
            await _send_event(send, {**head, "choices": [choice]})
        if self._wanted.usage:
            await _send_event(send, {**head, "choices": [], "usage": _usage(counts, made)})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._wanted.model}


async def _begin(send: Send) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_event(send: Send, event: dict[str, Any]) -> None:
    body = b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": body, "more_body": True})


def _check_length(language: Language, characters: int) -> None:
    """Raise for a text that cannot fit, before it is cut into tokens, which takes time in proportion."""
    if characters > language.most_characters:
        raise RefusedError(
            400,
            f"a text of {characters:,} characters; the model's context here is {language.model.context} tokens",
            code="context_length_exceeded",
        )


def _prompt(language: Language, item: str | Sequence[int]) -> Ids:
    import numpy as np

    if isinstance(item, str):
        _check_length(language, len(item))
        return language.model.tokenizer.encode(item)
    _check_length(language, len(item))
    return np.array(item, np.int64)


# --- the forms of answers


def _chat_chunk(
    index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool, tokenizer: Tokenizer,
    logprobs: int | None,
) -> dict[str, Any]:  # fmt: skip
    delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or finish is None else {})
    found = _chat_logprobs(tokens, tokenizer) if logprobs is not None and tokens else None
    return {"index": index, "delta": delta, "logprobs": found, "finish_reason": finish}


def _chat_answer(index: int, written: Written, tokenizer: Tokenizer, logprobs: int | None) -> dict[str, Any]:
    assert written.end is not None
    message = {"role": "assistant", "content": written.text, "refusal": None}
    found = None if logprobs is None else _chat_logprobs(written.tokens, tokenizer)
    return {"index": index, "message": message, "logprobs": found, "finish_reason": written.end.finish}


def _completion_chunk(
    index: int, text: str, tokens: Sequence[Token], finish: str | None, first: bool, tokenizer: Tokenizer,
    logprobs: int | None,
) -> dict[str, Any]:  # fmt: skip
    found = _logprobs(tokens, tokenizer) if logprobs is not None and tokens else None
    return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}


def _completion_answer(index: int, written: Written, tokenizer: Tokenizer, logprobs: int | None) -> dict[str, Any]:
    assert written.end is not None
    found = None if logprobs is None else _logprobs(written.tokens, tokenizer)
    return {"index": index, "text": written.text, "logprobs": found, "finish_reason": written.end.finish}


def _chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    def one(number: int, logprob: float) -> dict[str, Any]:
        spelled = tokenizer.bytes_of(number)
        return {
            "token": _spelling(number, tokenizer),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(spelled),
        }

    return {
        "content": [
            {**one(token.id, token.logprob), "top_logprobs": [one(*best) for best in token.best]} for token in tokens
        ],
        "refusal": None,
    }


def _logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": [_spelling(token.id, tokenizer) for token in tokens],
        "token_logprobs": [max(token.logprob, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": [
            {_spelling(number, tokenizer): max(logprob, LEAST_LOGPROB) for number, logprob in token.best}
            for token in tokens
        ],
        "text_offset": [],
    }


def _spelling(number: int, tokenizer: Tokenizer) -> str:
    if number in tokenizer.control:
        return tokenizer.text_of(number)
    return tokenizer.bytes_of(number).decode("utf-8", "replace")


def _usage(prompt: int, made: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
