"""The language model's load for tools/bench_corun.py: three streams of chat, and long prompts one after the other.

It comes from a process of its own that has the model (`separate`), or from clients of a daemon's HTTP API (`served`).
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import re
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from typing import Any

import numpy as np

CHATS, CHAT_ANSWER, LONG_PROMPT, LONG_ANSWER = 3, 100, 1500, 32
LONG_EVERY = 4.0  # seconds from one long prompt to the next
QUANTILES = (50, 99, 99.9, 100)


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{q:g}": round(1e3 * float(np.percentile(values, q)), 2) for q in QUANTILES} if values else {}


# --- the language model in a process of its own


def language_load(row: str, ready: Event, go: Event, stop: Event, answer: Any) -> None:
    """Run the language model's load from `go` to `stop`; put the moments of its tokens on the queue `answer`."""
    from runtimes.llm.model import load
    from runtimes.llm.request import Request
    from runtimes.llm.scheduler import Scheduler

    set_priority(row)
    found = re.search(r"(\d+) thread", row)
    budget = re.search(r"budget (\d+)", row)
    engine = "llamacpp" if row.startswith("llama.cpp") else "native"
    model = load("smollm2", engine=engine, context=8192, threads=int(found[1]) if found else 1)
    budget_tokens = int(budget[1]) if budget else 256
    scheduler, rng = Scheduler(model.engine, budget=budget_tokens), np.random.default_rng(0)
    log = Moments()

    def ask(chat: bool) -> None:
        prompt = rng.integers(0, len(model.tokenizer), 48 if chat else LONG_PROMPT)
        number = scheduler.submit(Request(prompt, CHAT_ANSWER if chat else LONG_ANSWER, drafts=0))
        log.asked(number, chat)

    for _ in range(CHATS):
        ask(chat=True)
    scheduler.step()
    ready.set()
    due, busy = time.perf_counter(), False  # when the next long prompt comes, and whether one is on its way
    while not stop.is_set():
        if not busy and time.perf_counter() >= due:
            due, busy = time.perf_counter() + LONG_EVERY, True
            ask(chat=False)
        for item in scheduler.step():
            if item.token is not None:
                log.token(item.request)
            if item.finish is not None:
                if log.ended(item.request):
                    ask(chat=True)
                else:
                    busy = False
        if go.is_set() and log.began is None:
            log.begin()
    answer.put(log.summary())


class Moments:
    """When requests got their tokens, from `begin` on."""

    def __init__(self) -> None:
        self._open: dict[Any, tuple[bool, float, float | None]] = {}  # by request: chat, asked, last token
        self._lock = threading.Lock()
        self.began: float | None = None
        self._between: list[float] = []
        self._first: list[float] = []
        self._tokens = self._prompts = 0

    def begin(self) -> None:
        with self._lock:
            self.began = time.perf_counter()
            self._between, self._first, self._tokens, self._prompts = [], [], 0, 0

    def asked(self, request: Any, chat: bool) -> None:
        with self._lock:
            self._open[request] = (chat, time.perf_counter(), None)

    def token(self, request: Any) -> None:
        now = time.perf_counter()
        with self._lock:
            chat, asked, last = self._open[request]
            self._tokens += 1
            if last is None and not chat:
                self._first.append(now - asked)
                self._prompts += LONG_PROMPT
            elif last is not None and chat:
                self._between.append(now - last)
            self._open[request] = (chat, asked, now)

    def ended(self, request: Any) -> bool:
        with self._lock:
            return self._open.pop(request)[0]

    def summary(self) -> dict[str, Any]:
        with self._lock:
            assert self.began is not None
            seconds = time.perf_counter() - self.began
            return {
                "generated_per_s": self._tokens / seconds,
                "long_prompt_tokens_per_s": self._prompts / seconds,
                "between_tokens_ms": percentiles(self._between),
                "long_first_token_s": statistics.median(self._first) if self._first else None,
            }


def set_priority(row: str) -> None:
    if "nice 19" in row:
        os.nice(19)
    if "idle" in row:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if "split" in row:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


@contextmanager
def separate(row: str) -> Iterator[Any]:
    """Yield (begin, end) of a language model in a process of its own; end returns what it gave."""
    context = multiprocessing.get_context("spawn")
    ready, go, stop, answer = context.Event(), context.Event(), context.Event(), context.Queue()
    process = context.Process(target=language_load, args=(row, ready, go, stop, answer), daemon=True)
    process.start()

    def end() -> dict[str, Any]:
        stop.set()
        found: dict[str, Any] = answer.get(timeout=60)
        process.join(30)
        return found

    try:
        while not ready.wait(0.5):
            if not process.is_alive():
                raise SystemExit(f"{row}: the language model's process ended with status {process.exitcode}")
        yield go.set, end
    finally:
        process.kill()
        process.join()


# --- edgekit serve


class Chat(threading.Thread):
    """A client of the daemon's HTTP API: it asks, reads the stream, and asks again."""

    def __init__(self, port: int, chat: bool, log: Moments, stop: threading.Event, seed: int) -> None:
        super().__init__(daemon=True)
        self._port, self._chat, self._log, self._halt = port, chat, log, stop
        self._rng = np.random.default_rng(seed)
        self.error = ""

    def run(self) -> None:
        number = 0
        while not self._halt.is_set():
            number += 1
            words = self._rng.integers(0, 10, 40 if self._chat else LONG_PROMPT - 30).tolist()
            body = {
                "model": "smollm2",
                "messages": [{"role": "user", "content": "".join(map(str, words))}],
                "max_tokens": CHAT_ANSWER if self._chat else LONG_ANSWER,
                "stream": True,
                "temperature": 0,  # as the model in a process of its own has it
                "drafts": 0,
            }
            request = (self.ident, number)
            due = time.monotonic() + (0.0 if self._chat else LONG_EVERY)
            self._log.asked(request, self._chat)
            try:
                self._read(body, request)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not self._halt.is_set():
                    self.error = f"{type(error).__name__}: {error}"
                return
            self._log.ended(request)
            self._halt.wait(max(0.0, due - time.monotonic()))

    def _read(self, body: dict[str, Any], request: Any) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ValueError(f"{response.status} {response.read()[:200]!r}")
        for line in response:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                self._log.token(request)
            if self._halt.is_set():
                break
        connection.close()


@contextmanager
def served(port: int) -> Iterator[Any]:
    """Yield (begin, end) of clients of a daemon."""
    log, stop = Moments(), threading.Event()
    clients = [Chat(port, number < CHATS, log, stop, number) for number in range(CHATS + 1)]
    for client in clients:
        client.start()

    def end() -> dict[str, Any]:
        found = log.summary()
        stop.set()
        if errors := [client.error for client in clients if client.error]:
            raise SystemExit(f"serve: a client failed: {errors[0]}")
        return found

    try:
        yield log.begin, end
    finally:
        stop.set()
