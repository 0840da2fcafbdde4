"""The guard of a compressed language model: it rolls back layers until the model is within its budget.

Layers go back in the order of their damage: the divergence of the source with this one layer compressed. A layer of 4
bits first gets 8 bits; only if 8 bits in all layers are too few, layers keep the format of the source.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

from edgekit.compression.guard import Verdict
from edgekit.compression.metrics import Measurement
from edgekit.errors import EdgekitError


@dataclass(frozen=True, slots=True)
class Quality:
    """A model against its source on the same tokens. divergence: mean Kullback-Leibler divergence of the next token's
    distribution from the source's, in nats; perplexity: its relative change; agreement: the share of tokens behind
    which both find the same next token most probable; source_perplexity: of the source itself."""

    divergence: Measurement
    perplexity: Measurement
    agreement: Measurement
    source_perplexity: float


@dataclass(frozen=True, slots=True)
class Budget:
    """What a compression may cost on held-out text, against the source. divergence: in nats for each token; perplexity:
    its relative growth; agreement: the least share of tokens behind which both models find the same token most
    probable."""

    divergence: float = 0.1
    perplexity: float = 0.05
    agreement: float = 0.85

    def __post_init__(self) -> None:
        for name, most in (("divergence", math.inf), ("perplexity", math.inf), ("agreement", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise EdgekitError(f"budget of {name} = {value:g}; expected a number from 0 to {most:g}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the guard decided. formats, quality: of the result; damages: of each layer, empty if none had to be known;
    reasons: why a layer was rolled back, by its number."""

    formats: Sequence[str]
    quality: Quality
    damages: Sequence[float]
    reasons: dict[int, str]


def judge(quality: Quality, budget: Budget) -> Verdict:
    """Decide whether a model is within the budget."""
    cost, growth, agree = quality.divergence, quality.perplexity, quality.agreement
    if not all(map(math.isfinite, (cost.value, growth.value))):
        return Verdict(False, f"its divergence from the source is {cost.value}, not a number")
    if cost.value > budget.divergence:
        return Verdict(
            False,
            f"diverges from the source by {cost.value:.4f} [{cost.low:.4f}, {cost.high:.4f}] nats per token, "
            f"{budget.divergence:g} allowed (n = {cost.samples:,})",
        )
    if growth.value > budget.perplexity:
        return Verdict(
            False,
            f"raises the perplexity by {growth.value:.2%} [{growth.low:.2%}, {growth.high:.2%}], "
            f"{budget.perplexity:.2%} allowed (n = {growth.samples:,})",
        )
    if agree.value < budget.agreement:
        return Verdict(
            False,
            f"agrees with the source on {agree.value:.1%} [{agree.low:.1%}, {agree.high:.1%}] of the tokens, "
            f"{budget.agreement:.1%} expected (n = {agree.samples:,})",
        )
    return Verdict(True, f"diverges by {cost.value:.4f} nats per token, perplexity {growth.value:+.2%}")


def kept_within(
    budget: Budget,
    quality: Quality,
    formats: Sequence[str],
    fallbacks: Sequence[str],
    damages: Callable[[], Sequence[float]],
    measure: Callable[[Sequence[str]], Quality],
) -> Outcome:
    """Return the model with the fewest layers rolled back that is within the budget.

    formats: of the layers, and quality: of the model with them; fallbacks: the formats to which layers are rolled back,
    the smallest first; damages, measure: are called only if the budget is exceeded. The result itself was measured. The
    search for the smallest number of layers assumes that a model with more of them rolled back is no worse.
    """
    first = judge(quality, budget)
    if first.kept:
        return Outcome(formats, quality, (), {})
    found = damages()
    order = sorted(range(len(formats)), key=lambda number: -_sortable(found[number]))
    best: tuple[int, Quality] | None = None
    search = _smallest(len(order) * len(fallbacks))
    verdict, steps = first, next(search)
    while steps is not None:
        measured = measure(rolled_back(formats, fallbacks, order, steps))
        verdict = judge(measured, budget)
        if verdict.kept:
            best = steps, measured
        steps = search.send(verdict.kept)
    if best is None:
        raise EdgekitError(
            f"nothing can be compressed within the budget: with all layers rolled back the model {verdict.reason}; "
            "allow more"
        )
    result = rolled_back(formats, fallbacks, order, best[0])
    reasons = {
        number: f"rolled back to {result[number]}: alone in {formats[number]} it diverges by {found[number]:.4f} "
        f"(number {rank} of {len(order)} layers); with all layers compressed the model {first.reason}"
        for rank, number in enumerate(order, start=1)
        if result[number] != formats[number]
    }
    return Outcome(result, best[1], found, reasons)


def rolled_back(formats: Sequence[str], fallbacks: Sequence[str], order: Sequence[int], steps: int) -> list[str]:
    """Return the formats of the layers after so many steps: each takes the next layer in the order to its next
    fallback."""
    result = list(formats)
    for step in range(steps):
        result[order[step % len(order)]] = fallbacks[step // len(order)]
    return result


def _smallest(most: int) -> Generator[int | None, bool, None]:
    """A search for the smallest number from 1 to `most` that is enough: it yields numbers to try, is sent whether each
    is enough, and yields None at the end."""
    low, high, width = 0, most + 1, 1  # low is not enough
    while high - low > 1:
        guess = min(low + width, most) if high > most else (low + high) // 2
        enough = yield guess
        if enough:
            high = guess
        else:
            low, width = guess, 2 * width
    yield None


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else math.inf
