"""Answers that obey a rule: a JSON schema, or a regular expression.

Before each choice the rule says which tokens may come, and all others are left out. `llguidance` keeps the state of the
rule and computes the tokens; this module gives it the model's vocabulary and reports its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, missing_extra
from runtimes.llm.tokenizer import Tokenizer

# how Python's json.dumps separates: models have seen most JSON so, and free white space would let an answer go on
# without end
SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint(Protocol):
    """The rule of one answer."""

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Return (vocabulary,) which tokens may come next; the tokens that end an answer are among them if it may end
        here. Raises if there are none."""

    def advance(self, token: int) -> None:
        """Note that this token was chosen. A token that ends an answer is not given."""


class Grammars:
    """Makes the rules of one model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import llguidance
        except ImportError:
            raise missing_extra("llguidance", "llm", "a constraint") from None
        if not tokenizer.ends:
            raise EdgekitError("this model has no token that ends an answer, so a constraint cannot end one")
        self._library: Any = llguidance
        self._size = len(tokenizer)
        words = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
        self._tokenizer = llguidance.LLTokenizer(words, eos_token=sorted(tokenizer.ends))

    def json_schema(self, schema: Mapping[str, Any]) -> Callable[[], Constraint]:
        """Return what makes the rule of an answer that is JSON of this schema."""
        try:
            text = json.dumps(dict(schema))
            grammar = self._library.LLMatcher.grammar_from_json_schema(text, overrides=SEPARATORS)
        except (TypeError, ValueError, RecursionError) as error:
            raise EdgekitError(f"the JSON schema is malformed: {_first_line(str(error))}") from None
        return self._checked(grammar, "the JSON schema")

    def regex(self, pattern: str) -> Callable[[], Constraint]:
        """Return what makes the rule of an answer that matches a regular expression from its first character to its
        last. The syntax is that of Rust's `regex`: it has no look-around and no references to groups, and `\\d` is any
        digit of Unicode, so write `[0-9]` for these ten."""
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:  # the library would take it for an escaped end
            raise EdgekitError(f"the regular expression {pattern!r} ends with a backslash; write two for one")
        grammar = self._library.LLMatcher.grammar_from_regex(pattern)
        return self._checked(grammar, f"the regular expression {pattern!r}")

    def _checked(self, grammar: str, what: str) -> Callable[[], Constraint]:
        matcher = self._library.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise EdgekitError(f"{what} cannot be used: {_first_line(matcher.get_error())}")
        return lambda: _Grammar(matcher.deep_copy(), self._size, what)


class _Grammar:
    """The state of a rule that llguidance keeps."""

    def __init__(self, matcher: Any, size: int, what: str) -> None:
        self._matcher, self._size, self._what = matcher, size, what

    @property
    def done(self) -> bool:
        return bool(self._matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        if not found.any():
            raise EdgekitError(f"{self._what} allows no token here; the model's vocabulary cannot write it")
        return found

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise EdgekitError(f"{self._what} is too complex: {_first_line(self._matcher.get_error())}")


class _Vocabulary:
    """The model's vocabulary as llguidance wants it: the bytes of each token, and the texts of control tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = min(tokenizer.ends), tokenizer.bos
        self.special_token_ids = sorted(tokenizer.control)
        self.tokens = [
            tokenizer.text_of(number).encode() if number in tokenizer.control else tokenizer.bytes_of(number)
            for number in range(len(tokenizer))
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        read = text.decode() if isinstance(text, bytes) else text
        ids: list[int] = self._tokenizer.encode(read, begin=False).tolist()
        return ids


def _first_line(message: str) -> str:
    """Return what a message of the library says is wrong, without the picture of the place."""
    _, found, reason = message.partition("\nerror:")
    return (reason if found else message).strip().partition("\n")[0]
