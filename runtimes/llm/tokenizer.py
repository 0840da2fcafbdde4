"""Text to tokens and back, by the vocabulary that the model's file brings.

The byte-pair encoding itself is Hugging Face's `tokenizers`. `vocabulary` reads what it needs from a GGUF file or from
tokenizer.json; this module keeps control tokens out of plain text, and turns tokens into text as they come.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError
from runtimes.llm.vocabulary import Vocabulary

MOST_CHARACTERS = 1 << 24  # of a text
# Unicode keeps these two for programs' own use. GUARD before the text of a control token says that it is plain text;
# GUARD and ESCAPE together are a GUARD of the text itself.
GUARD, ESCAPE = "\ufdd0", "\ufdd1"


class Tokenizer:
    """The tokenizer of a model. bos, eos: ids of the tokens that begin a text and end an answer, if there are any;
    ends: all ids that end an answer; control: ids of tokens that have no text in an answer."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._tokens, self.control = vocabulary.tokens, vocabulary.control
        self.bos, self.eos, self.ends = vocabulary.bos, vocabulary.eos, vocabulary.ends
        self._numbers = {self._tokens[number]: number for number in sorted(self.control) if self._tokens[number]}
        control = "|".join(map(re.escape, sorted(self._numbers, key=len, reverse=True))) or "(?!)"
        self._special = re.compile(f"(?<!{GUARD})({control})")
        self._guarded = re.compile(f"{GUARD}|(?={control})")

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, *, special: bool = False, begin: bool = True) -> npt.NDArray[np.int64]:
        """Return (tokens,) ids. special: whether the text of a control token, such as <|im_end|>, becomes that token,
        as chat templates need it, except where it is in a text that was guarded; begin: whether the model's token for a
        beginning comes first, if it wants one."""
        if len(text) > MOST_CHARACTERS:
            raise EdgekitError(f"a text of {len(text):,} characters; edgekit takes up to {MOST_CHARACTERS:,}")
        ids = [*self._with_control(text)] if special else self._vocabulary.encode(text, first=True)
        if begin and self._vocabulary.adds_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return np.array(ids, np.int64)

    def guard(self, text: str) -> str:
        """Return a text of a stranger for a chat template: no control token in it becomes one, and nothing else of it
        changes."""
        return self._guarded.sub(lambda found: GUARD + ESCAPE if found[0] else GUARD, text)

    def _with_control(self, text: str) -> Iterator[int]:
        parts = self._special.split(text)
        for number, part in enumerate(parts):
            if number % 2:
                yield self._numbers[part]
                continue
            if number and self._numbers[parts[number - 1]] in self._vocabulary.strips_right:
                part = part.lstrip()
            if number + 1 < len(parts) and self._numbers[parts[number + 1]] in self._vocabulary.strips_left:
                part = part.rstrip()
            plain = re.sub(f"{GUARD}({ESCAPE})?", lambda found: GUARD if found[1] else "", part)
            yield from self._vocabulary.encode(plain, first=number == 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; control tokens have none."""
        stream = TextStream(self)
        text = "".join([*map(stream.add, ids), stream.end()])
        return text.removeprefix(" ") if self._vocabulary.adds_space else text

    def bytes_of(self, number: int) -> bytes:
        """Return the bytes of a token: a character may begin in one token and end in the next."""
        if number in self.control:
            return b""
        if number in self._vocabulary.added:
            return self._tokens[number].encode()
        return self._vocabulary.spelling(self._tokens[number])

    def text_of(self, number: int) -> str:
        """Return a token as the file writes it."""
        return self._tokens[number]


class TextStream:
    """The text of tokens that come one by one. Bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, number: int) -> str:
        return self._decoder.decode(self._tokenizer.bytes_of(number))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)
