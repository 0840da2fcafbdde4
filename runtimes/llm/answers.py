"""Whole answers, with the log probability of each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from runtimes.llm.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer. logprob: the natural logarithm of the probability that the model gives it, before
    temperature, penalties and constraints; best: the ids of the most probable tokens here, and their logprobs."""

    id: int
    logprob: float
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """finish: "stop" if the model, a stop text or a constraint ended the answer, "length" if it has the most tokens.
    tokens: all that were chosen; a stop text is among them, and not in the text."""

    text: str
    finish: Literal["stop", "length"]
    tokens: Sequence[Token]

    @property
    def logprob(self) -> float:
        """The sum over the tokens."""
        return sum(token.logprob for token in self.tokens)

    def as_json(self, tokenizer: Tokenizer, logprobs: bool) -> dict[str, Any]:
        """Return it for JSON. logprobs: whether with each token; bytes that are no text become U+FFFD."""
        found: dict[str, Any] = {"text": self.text, "finish": self.finish}
        if logprobs:
            found["logprob"] = self.logprob
            found["tokens"] = [
                {
                    **_as_json(tokenizer, token.id, token.logprob),
                    "best": [_as_json(tokenizer, number, logprob) for number, logprob in token.best],
                }
                for token in self.tokens
            ]
        return found


def scored(logits: npt.NDArray[np.float32], token: int, best: int) -> Token:
    """Return a chosen token with its log probability and those of the `best` most probable ones; among equals the
    smaller id comes first."""
    logprobs = log_softmax(logits)
    best = min(best, len(logprobs))
    found = np.flatnonzero(logprobs >= np.partition(logprobs, -best)[-best]) if best else np.empty(0, np.int64)
    order = found[np.argsort(-logprobs[found], kind="stable")][:best].tolist()
    return Token(token, float(logprobs[token]), tuple((number, float(logprobs[number])) for number in order))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return log probabilities over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def _as_json(tokenizer: Tokenizer, number: int, logprob: float) -> dict[str, Any]:
    control = number in tokenizer.control
    text = tokenizer.text_of(number) if control else tokenizer.bytes_of(number).decode("utf-8", "replace")
    return {"id": number, "text": text, "logprob": logprob}
