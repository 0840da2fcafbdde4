"""Drafts by prompt lookup: guess the next tokens as those that followed the same words earlier in the sequence.

An answer that copies from its prompt, or from itself, repeats runs of tokens. The last three tokens, or else the last
two, are looked up in the sequence, and what followed them there is the draft. The engine verifies a draft in one step:
it computes the logits behind each of its tokens, each choice is made as without a draft, and the draft is kept as far
as it equals the choices. (Leviathan et al., arXiv 2211.17192, verify a draft; Yang et al., LLMA, arXiv 2304.04487, take
it from the text before.)

`StepTime` and `worthwhile` decide how many tokens of drafts a step verifies. They change the speed and no token.
"""

from __future__ import annotations

from collections.abc import Sequence

MOST_DRAFTS = 8  # tokens of a draft; the 8th is seldom right, even in texts that copy
SIZES = (3, 2)  # tokens that are looked up, the longer run first because it is right more often
LEARNING = 0.1  # share of the newest guess in the rate of right ones: the last ten or so count
FORGETTING = 0.97  # of step times: the last thirty or so count
MOST_SURPRISE = 2.0  # a step that took longer than this many times the expected seconds counts as this many
LEAST_SPREAD = 1e-3  # variance of step sizes, in tokens squared, below which the slope is not known


class Lookup:
    """The drafts of one sequence, and how often they were right. Each guess counts, verified or not, because the token
    that was chosen shows whether it was right; so drafts come back when a text begins to repeat itself."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # by run: the index of the token behind its last occurrence
        self._indexed = 0
        self._rates = dict.fromkeys(SIZES, 0.5)
        self._size = SIZES[0]  # of the run that was found
        self._guesses: list[int] = []  # that no choice was compared with yet

    def find(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return up to `most` tokens that may follow. tokens: of the sequence, those of the last call and more."""
        for end in range(self._indexed, len(tokens)):
            for size in SIZES:
                if end >= size:
                    self._after[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        self._guesses = []
        for size in SIZES:
            at = self._after.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if at is not None:
                period = len(tokens) - at  # a run that reaches the end of the sequence goes on from its beginning
                self._size, self._guesses = size, [tokens[at + number % period] for number in range(most)]
                break
        return list(self._guesses)

    def chances(self, draft: Sequence[int]) -> list[float]:
        """Return the probability that each token of a draft is kept."""
        return [self._rates[self._size] ** (number + 1) for number in range(len(draft))]

    def learn(self, token: int) -> None:
        """Compare the next guess with the token that was chosen."""
        if self._guesses:
            right = self._guesses.pop(0) == token
            self._rates[self._size] += LEARNING * (right - self._rates[self._size])
            if not right:
                self._guesses = []


class StepTime:
    """Seconds of a step by its tokens: a line, fitted to the last steps by least squares."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        if self._weight and self.slope:
            seconds = min(seconds, MOST_SURPRISE * self.of(tokens))
        self._weight = FORGETTING * self._weight + 1
        self._tokens = FORGETTING * self._tokens + tokens
        self._seconds = FORGETTING * self._seconds + seconds
        self._squares = FORGETTING * self._squares + tokens * tokens
        self._products = FORGETTING * self._products + tokens * seconds

    @property
    def known(self) -> bool:
        return self._weight > 0

    @property
    def slope(self) -> float:
        """Seconds of a further token. As long as the steps had one size it is 0, so that another size is tried."""
        mean = self._tokens / self._weight
        spread = self._squares / self._weight - mean * mean
        if spread < LEAST_SPREAD:
            return 0.0
        return max(0.0, (self._products / self._weight - mean * self._seconds / self._weight) / spread)

    def of(self, tokens: int) -> float:
        """Return the expected seconds of a step."""
        return self._seconds / self._weight + self.slope * (tokens - self._tokens / self._weight)


def worthwhile(chances: Sequence[float], tokens: int, time: StepTime) -> int:
    """Return how many drafts to verify beside `tokens` others: as many as raise the expected tokens per second.
    chances: that each draft is kept, the most probable first."""
    if not time.known:
        return 0
    seconds, slope, gained = time.of(tokens), time.slope, float(tokens)
    for number, chance in enumerate(chances):
        if chance * seconds <= slope * gained:
            return number
        seconds, gained = seconds + slope, gained + chance
    return len(chances)
