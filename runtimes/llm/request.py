"""A request for an answer, what a step gave it, and its state while it is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from runtimes.llm.constraint import Constraint
from runtimes.llm.lookup import MOST_DRAFTS, Lookup
from runtimes.llm.sampling import Sampling

Finish = Literal["stop", "length", "failed"]


@dataclass(frozen=True, slots=True)
class Request:
    """prompt: (tokens,) ids, at least one; most_tokens: of the answer; ends: ids that end the answer; interactive:
    whether somebody waits for it; drafts: the most tokens that a step may guess and verify, 0 for none; constraint:
    makes the rule that says which tokens may come."""

    prompt: npt.NDArray[np.int64]
    most_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    interactive: bool = True
    drafts: int = MOST_DRAFTS
    constraint: Callable[[], Constraint] | None = None


@dataclass(frozen=True, slots=True)
class StepShape:
    """What the time of a step depends on. tokens: that it computes; pairs: of such a token and a token that it sees;
    sequences: to which they belong."""

    tokens: int
    pairs: int
    sequences: int


@dataclass(frozen=True, slots=True)
class Produced:
    """What a step gave a request: a token, or, with `finish`, the end of its answer. logits: (vocabulary,) from which
    the token was chosen; error: of an answer that failed."""

    request: int
    token: int | None
    finish: Finish | None
    logits: npt.NDArray[np.float32] | None = None
    error: EdgekitError | None = None


@dataclass(slots=True, eq=False)
class Running:
    """A request on its way. tokens: of the prompt and the answer so far; computed: how many of them the engine has;
    draft: guessed tokens that the next step verifies; constraint: the state of its rule; leader: a request with the
    same prompt, whose keys and values this one takes over."""

    number: int
    request: Request
    since: float
    tokens: list[int]
    constraint: Constraint | None
    leader: Running | None = None
    computed: int = 0
    answered: int = 0
    cancelled: bool = False
    lookup: Lookup = field(default_factory=Lookup)
    draft: list[int] = field(default_factory=list)

    @property
    def answering(self) -> bool:
        """Whether the next token of its answer is one step away."""
        return self.computed == len(self.tokens) - 1 and self.answered > 0

    @property
    def most_drafts(self) -> int:
        """How many drafts the next step may verify. The step gives one token more than it accepts drafts."""
        return min(self.request.drafts, self.request.most_tokens - self.answered - 1)
