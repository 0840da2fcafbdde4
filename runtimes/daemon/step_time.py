"""Predict how long a step of a language model takes, and how many tokens fit into a time.

    seconds = a + b tokens + c pairs + d sequences

`pairs` are the pairs of a token and a token that it sees. The four numbers are fitted to the steps that were measured,
by recursive least squares on relative errors, so that short steps count as much as long ones. A device that becomes
slower or faster, because of heat or of other programs, makes every step longer or shorter by one factor: one step that
is far off makes the next prediction careful, and a second one in the same direction scales all four numbers at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from runtimes.llm.request import StepShape

FORGETTING = 0.995  # of measured steps: the last two hundred or so count
UNCERTAIN = 1e3  # variance of a number that is not known yet, relative to the first step
SURPRISE = 1.3  # a step that takes this many times as long as predicted, or a fraction of it, may be a change of speed
SPREAD_LEARNING = 0.02  # share of the newest step in the size of the usual error
MARGIN = 3.0  # usual errors by which a careful prediction is longer
LEAST_STEPS, FIRST_BUDGET = 4, 16  # steps before a prediction is trusted, and tokens of a step until then


class StepTime:
    """The seconds of one engine's steps."""

    def __init__(self) -> None:
        self._numbers = np.zeros(4)
        self._covariance = np.eye(4) * UNCERTAIN
        self._caution = 1.0  # how many times longer than predicted the last step took, if that was a surprise
        self._spread = 0.05**2  # mean square of relative errors
        self.steps = self.changes = 0  # steps that were learned from, and changes of speed that were found

    @property
    def known(self) -> bool:
        return self.steps >= LEAST_STEPS

    def seconds(self, shape: StepShape) -> float:
        """Return how long a step will take, as predicted; 0 before the first one was measured."""
        return float(np.maximum(self._numbers, 0) @ _features(shape))

    def at_most(self, shape: StepShape) -> float:
        """Return a time that a step rarely exceeds."""
        return self.seconds(shape) * self._caution * (1 + MARGIN * math.sqrt(self._spread))

    def learn(self, shape: StepShape, seconds: float) -> None:
        """Take a measured step into account."""
        if seconds <= 0:
            return  # the clock did not move, so there is nothing to learn
        predicted = self.seconds(shape)
        ratio = seconds / predicted if self.known and predicted > 0 else 1.0
        if 1 / SURPRISE < ratio < SURPRISE:
            self._caution = 1.0
            self._fit(_features(shape), seconds)
            if self.known:
                self._spread += SPREAD_LEARNING * ((ratio - 1) ** 2 - self._spread)
        elif (self._caution > 1) == (ratio > 1) and self._caution != 1:
            self._numbers *= math.sqrt(ratio * self._caution)
            self._caution = 1.0
            self.changes += 1
        else:
            self._caution = ratio

    def budget(self, seconds: float, answers: Sequence[int], prompt: int, most: int) -> int:
        """Return how many tokens a step may have to end within a time, from 1 to `most`. answers: tokens before each
        answer's next token; prompt: tokens of the next prompt that are computed already."""
        if not self.known:
            return min(FIRST_BUDGET, most)
        low, high = 1, most
        while low < high:
            middle = (low + high + 1) // 2
            if self.at_most(shape_of(middle, answers, prompt)) <= seconds:
                low = middle
            else:
                high = middle - 1
        return low

    def _fit(self, features: np.ndarray[tuple[int], np.dtype[np.float64]], seconds: float) -> None:
        row = features / seconds  # the wanted product of the row and the numbers is 1
        gain = self._covariance @ row
        scale = FORGETTING + float(row @ gain)
        self._numbers = self._numbers + gain * (1.0 - float(row @ self._numbers)) / scale
        shrunk = self._covariance - np.outer(gain, gain) / scale
        # steps of one size say nothing about others: what they do not measure must not become ever more uncertain
        grown = shrunk / FORGETTING
        self._covariance = grown if float(np.trace(grown)) <= 4 * UNCERTAIN else shrunk
        self.steps += 1


def shape_of(tokens: int, answers: Sequence[int], prompt: int) -> StepShape:
    """Return the shape of a step that gives each answer a token, as far as there are enough, and the rest to a
    prompt."""
    answering = answers[:tokens]
    rest = tokens - len(answering)
    pairs = sum(answering) + len(answering) + rest * prompt + rest * (rest + 1) // 2
    return StepShape(tokens, pairs, len(answering) + (rest > 0))


def _features(shape: StepShape) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array([1.0, shape.tokens, shape.pairs / 1024, shape.sequences]) / 1024
