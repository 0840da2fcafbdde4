"""Measure how far a compressed language model is from its source on text: KL divergence, perplexity, most probable
token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgekit.compression.metrics import Measurement
from runtimes.llm.architecture import Layer
from runtimes.llm.compression.forward import LayerEngine, Window
from runtimes.llm.compression.guard import Quality
from runtimes.llm.compression.plan import Progress
from runtimes.llm.engine import Ids

Float64 = npt.NDArray[np.float64]
PART = 64  # tokens that are drawn together: neighbours in a text are no independent samples
DRAWS = 1000


@dataclass(frozen=True, slots=True)
class _Rows:
    """Of each token: the divergence, whether both models agree, and -log p of the next token in both."""

    divergence: Float64
    agree: Float64
    source: Float64
    candidate: Float64


def compare(
    source: tuple[LayerEngine, Sequence[Window]],
    candidate: tuple[LayerEngine, Sequence[Window]],
    *,
    seed: int = 0,
) -> Quality:
    """Compare two models, each behind its last layer on the same windows."""
    parts = [
        _rows(source[0], before, candidate[0], after) for before, after in zip(source[1], candidate[1], strict=True)
    ]
    divergence, agree = (np.concatenate([getattr(part, name) for part in parts]) for name in ("divergence", "agree"))
    expected, found = (np.concatenate([getattr(part, name) for part in parts]) for name in ("source", "candidate"))
    return Quality(
        _measured(divergence, _mean, seed),
        _measured(found - expected, lambda values: float(np.expm1(values.mean())), seed),
        _measured(agree, _mean, seed),
        float(np.exp(expected.mean())),
    )


def layer_damages(
    engine: LayerEngine,
    source: Sequence[Layer],
    candidate: Callable[[int], Layer],
    windows: Sequence[Ids],
    progress: Progress = lambda what, done, total: None,
) -> list[float]:
    """Return for each layer the divergence of the source with this one layer replaced by its candidate."""
    before = [engine.begun(windows)]
    for number, layer in enumerate(source):
        before.append([window.copy() for window in before[-1]])
        engine.run_layer(number, layer, before[-1])
    found = []
    for number in range(len(source)):
        states = [window.copy() for window in before[number]]
        for later in range(number, len(source)):
            engine.run_layer(later, candidate(later) if later == number else source[later], states)
        found.append(compare((engine, before[-1]), (engine, states)).divergence.value)
        progress("damage of each layer", number + 1, len(source))
    return found


def _rows(source: LayerEngine, before: Window, candidate: LayerEngine, after: Window) -> _Rows:
    found: list[tuple[Float64, Float64, Float64, Float64]] = []
    following = torch.from_numpy(before.ids[1:])
    for (rows, expected), (_, given) in zip(
        source.log_probabilities(before), candidate.log_probabilities(after), strict=True
    ):
        divergences = (expected.exp() * (expected - given)).sum(-1)
        agree = (expected.argmax(-1) == given.argmax(-1)).double()
        next_ids = following[rows][:, None]
        losses = [-part[: len(next_ids)].gather(1, next_ids)[:, 0] for part in (expected, given)]
        found.append(tuple(item.numpy() for item in (divergences, agree, *losses)))  # type: ignore[arg-type]
    return _Rows(*(np.concatenate(column) for column in zip(*found, strict=True)))


def _mean(values: Float64) -> float:
    return float(values.mean())


def _measured(samples: Float64, value: Callable[[Float64], float], seed: int) -> Measurement:
    """Return a value of all tokens with its 95 % bootstrap interval over parts of the text."""
    parts = np.array_split(samples, max(1, len(samples) // PART))
    rng = np.random.default_rng(seed)
    drawn = [value(np.concatenate([parts[at] for at in rng.integers(0, len(parts), len(parts))])) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Measurement(value(samples), float(low), float(high), len(samples))
