"""Byte-pair encoding as sentencepiece does it (Kudo and Richardson, arXiv 1808.06226): pieces with scores.

Neighbouring pieces are joined as long as the vocabulary has the joined piece, the best score first, and the leftmost of
equal ones. A list of merges, as the byte-pair encodings of other libraries have it, cannot say this: there, two ways to
write one piece have two ranks. Characters without a piece become bytes.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence

SPACE = "\u2581"  # how sentencepiece writes a space
MOST_WORDS = 1 << 16  # whose pieces are remembered


class Pieces:
    """scores: of the pieces that text may be joined to, by text; numbers: their ids; unused: pieces that are only
    steps to longer ones; user_defined: texts that are a piece wherever they are; bytes_: 256 ids, or () for none;
    unknown: the id of what has no piece; adds_space: whether each text begins with a space that was not in it."""

    def __init__(
        self,
        scores: Mapping[str, float],
        numbers: Mapping[str, int],
        unused: frozenset[str],
        user_defined: Sequence[str],
        bytes_: Sequence[int],
        unknown: int,
        adds_space: bool,
    ) -> None:
        self._scores, self._numbers, self._unused = scores, numbers, unused
        self._bytes, self._unknown, self._adds_space = bytes_, unknown, adds_space
        longest_first = sorted(filter(None, user_defined), key=len, reverse=True)
        self._user_defined = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        # no piece has a space behind another character, so nothing joins two words, and words can be remembered
        self._by_word = not any(SPACE in piece.lstrip(SPACE) for piece in scores)
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        if not text:
            return []
        text = text.replace(" ", SPACE)
        ids = [*self._parts(SPACE + text if self._adds_space else text)]
        if self._bytes:
            return ids
        # what has no piece is one unknown token as far as it goes
        return [number for at, number in enumerate(ids) if number != self._unknown or ids[at - 1 : at] != [number]]

    def _parts(self, text: str) -> Iterator[int]:
        end = 0
        for found in self._user_defined.finditer(text):
            yield from self._words(text[end : found.start()])
            yield self._numbers[found[0]]
            end = found.end()
        yield from self._words(text[end:])

    def _words(self, text: str) -> Iterator[int]:
        words = re.findall(f"{SPACE}*[^{SPACE}]+|{SPACE}+", text) if self._by_word else [text]
        for word in words:
            if word not in self._known:
                if len(self._known) >= MOST_WORDS:
                    self._known.clear()
                self._known[word] = [number for piece in self._joined(word) for number in self._ids(piece)]
            yield from self._known[word]

    def _joined(self, word: str) -> Iterator[str]:
        """Yield the pieces of a word."""
        pieces: list[str] = list(word)  # joined pieces leave "" behind them
        before, behind = list(range(-1, len(word) - 1)), list(range(1, len(word) + 1))
        waiting: list[tuple[float, int, str]] = []  # the score negated, where the left piece is, and the joined piece
        made: dict[str, tuple[str, str]] = {}

        def consider(left: int, right: int) -> None:
            if left < 0 or right >= len(pieces):
                return
            joined = pieces[left] + pieces[right]
            if joined in self._scores:
                heapq.heappush(waiting, (-self._scores[joined], left, joined))
                if joined in self._unused:
                    made[joined] = pieces[left], pieces[right]

        for left in range(len(word) - 1):
            consider(left, left + 1)
        while waiting:
            _, left, joined = heapq.heappop(waiting)
            right = behind[left]
            if not pieces[left] or right >= len(pieces) or pieces[left] + pieces[right] != joined:
                continue  # one of the two was joined with another
            pieces[left], pieces[right] = joined, ""
            behind[left] = behind[right]
            if behind[left] < len(pieces):
                before[behind[left]] = left
            consider(before[left], left)
            consider(left, behind[left])
        for piece in filter(None, pieces):
            yield from self._steps(piece, made)

    def _steps(self, piece: str, made: Mapping[str, tuple[str, str]]) -> Iterator[str]:
        """Yield an unused piece as the pieces that it was joined from."""
        if piece in self._unused and piece in made:
            for part in made[piece]:
                yield from self._steps(part, made)
        else:
            yield piece

    def _ids(self, piece: str) -> list[int]:
        if piece in self._numbers and piece not in self._unused:
            return [self._numbers[piece]]
        return [self._bytes[byte] for byte in piece.encode(errors="replace")] if self._bytes else [self._unknown]
