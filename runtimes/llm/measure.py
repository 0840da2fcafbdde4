"""Measure an engine's speed, and what the machine's memory allows."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekit.cost.timing import in_turns, timed
from runtimes.llm.engine import Engine, Ids, Item

CHUNK = 256  # tokens of a step of a prompt
STREAM = 1 << 28  # bytes that are read to measure the memory, more than caches hold


@dataclass(frozen=True, slots=True)
class Speed:
    """context: tokens before; prompt_rate: tokens per second up to there; seconds: of a step with one token, median;
    bound_share: of the tokens per second that reading the weights and the cache once would allow, None if the engine
    does not know its bytes."""

    context: int
    prompt_rate: float
    seconds: float
    bound_share: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(engine: Engine, context: int, rounds: int, seed: int = 0) -> Speed:
    """Time a prompt of `context` random tokens, and the token behind it."""
    return measure_in_turns([engine], context, rounds, seed)[0]


def measure_in_turns(engines: Sequence[Engine], context: int, rounds: int, seed: int = 0) -> list[Speed]:
    """Time the same for several engines: the prompt once, and the token behind it in turns."""
    ids: Ids = np.random.default_rng(seed).integers(0, engines[0].architecture.vocabulary, context + 1)
    sequence, rates = -2, []
    try:
        for engine in engines:
            chunk, started = min(CHUNK, engine.rows), time.perf_counter()
            for start in range(0, context, chunk):
                engine.step([Item(sequence, ids[start : min(start + chunk, context)], logits="none")])
            rates.append(context / (time.perf_counter() - started))

        def one(engine: Engine) -> None:
            engine.step([Item(sequence, ids[context:])])
            engine.truncate(sequence, context)

        calls = [timed(functools.partial(one, engine), time.perf_counter) for engine in engines]
        taken = np.median(in_turns(calls, least=rounds, most=rounds)[:, :, 0], axis=0)
    finally:
        for engine in engines:
            if sequence in engine.blocks.tables:
                engine.remove(sequence)
    found, bound = [], memory_rate()
    for engine, rate, seconds in zip(engines, rates, taken.tolist(), strict=True):
        read = engine.bytes_read(context)
        found.append(Speed(context, rate, seconds, None if read is None else read / bound / seconds))
    return found


def memory_rate() -> float:
    """Return how many bytes per second one thread reads from memory, at best."""
    block = np.ones(STREAM // 8, np.int64)
    return STREAM / float(in_turns([timed(block.max, time.perf_counter)], least=5, most=5).min())
