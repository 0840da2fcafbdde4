"""Text to tokens and back, by the vocabulary that the model's file brings.

The byte-pair encoding itself is Hugging Face's `tokenizers`. This module gives it the file's vocabulary and merges, and
the rule by which the family splits text into words before merging.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError, missing_extra, unknown
from edgekit.importers.gguf import GgufFile

CONTROL, USER_DEFINED = 3, 4  # types of tokens in the file; text never becomes a control token by chance
MOST_CHARACTERS = 1 << 24  # of a text
# Unicode keeps these two for programs' own use. GUARD before the text of a control token says that it is plain text;
# GUARD and ESCAPE together are a GUARD of the text itself.
GUARD, ESCAPE = "\ufdd0", "\ufdd1"

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# the words of each family, by the name that the file has for its rule; None: GPT-2's
WORDS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,  # after every digit became a word of its own
    "qwen2": rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
}


class Tokenizer:
    """The tokenizer of a model. bos, eos: ids of the tokens that begin a text and end an answer, if there are any;
    ends: all ids that end an answer; control: ids of tokens that have no text in an answer."""

    def __init__(self, file: GgufFile) -> None:
        model = file.get("tokenizer.ggml.model", str)
        if model != "gpt2":
            raise unknown("tokenizer", model, ["gpt2"], where=str(file.path))
        rule = file.get("tokenizer.ggml.pre", str)
        if rule not in WORDS:
            raise unknown("rule for words of the tokenizer", rule, WORDS, where=str(file.path))
        self._tokens: list[str] = file.get("tokenizer.ggml.tokens", list)
        types = file.get("tokenizer.ggml.token_type", np.ndarray, np.ones(len(self._tokens), np.int32))
        merges = file.get("tokenizer.ggml.merges", list)
        if len(types) != len(self._tokens) or len(set(self._tokens)) != len(self._tokens):
            raise EdgekitError(f"{file.path}: the vocabulary is damaged; download the model again")
        self.control = frozenset(number for number, kind in enumerate(types.tolist()) if kind == CONTROL)
        self._added = {number for number, kind in enumerate(types.tolist()) if kind in (CONTROL, USER_DEFINED)}
        self._numbers = {self._tokens[number]: number for number in sorted(self._added)}
        vocabulary = {token: number for number, token in enumerate(self._tokens) if number not in self.control}
        self._encoder = _encoder(file, vocabulary, merges, rule, sorted(self._added - self.control))
        longest_first = sorted((token for token in self._numbers if token), key=len, reverse=True)
        every = "|".join(map(re.escape, longest_first)) or r"(?!)"
        control = "|".join(re.escape(token) for token in longest_first if self._numbers[token] in self.control)
        self._special = re.compile(f"(?<!{GUARD})({every})")
        self._guarded = re.compile(f"{GUARD}|(?={control or '(?!)'})")
        self.bos, self.eos = (self._named(file, name) for name in ("bos", "eos"))
        adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, rule == "llama-bpe")  # Llama 3's files leave it out
        self._adds_bos = adds_bos and self.bos is not None
        ends = [self._named(file, name) for name in ("eos", "eot", "eom")]
        self.ends = frozenset(number for number in ends if number is not None)

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, *, special: bool = False, begin: bool = True) -> npt.NDArray[np.int64]:
        """Return (tokens,) ids. special: whether the text of a control token, such as <|im_end|>, becomes that token,
        as chat templates need it, except where it is in a text that was guarded; begin: whether the model's token for a
        beginning comes first, if it wants one."""
        if len(text) > MOST_CHARACTERS:
            raise EdgekitError(f"a text of {len(text):,} characters; edgekit takes up to {MOST_CHARACTERS:,}")
        ids = [*self._with_control(text)] if special else self._encoder.encode(text, add_special_tokens=False).ids
        if begin and self._adds_bos and ids[:1] != [self.bos]:
            ids = [self.bos, *ids]
        return np.array(ids, np.int64)

    def guard(self, text: str) -> str:
        """Return a text of a stranger for a chat template: no control token in it becomes one, and nothing else of it
        changes."""
        return self._guarded.sub(lambda found: GUARD + ESCAPE if found[0] else GUARD, text)

    def _with_control(self, text: str) -> Iterator[int]:
        for number, part in enumerate(self._special.split(text)):
            if number % 2:
                yield self._numbers[part]
            else:
                plain = re.sub(f"{GUARD}({ESCAPE})?", lambda found: GUARD if found[1] else "", part)
                yield from self._encoder.encode(plain, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of tokens; control tokens have none."""
        stream = TextStream(self)
        return "".join([*map(stream.add, ids), stream.end()])

    def bytes_of(self, number: int) -> bytes:
        """Return the bytes of a token: a character may begin in one token and end in the next."""
        if number in self.control:
            return b""
        text = self._tokens[number]
        if number in self._added:
            return text.encode()
        return b"".join(bytes([_BYTES[letter]]) if letter in _BYTES else letter.encode() for letter in text)

    def text_of(self, number: int) -> str:
        """Return a token as the file writes it."""
        return self._tokens[number]

    def _named(self, file: GgufFile, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in file.metadata:
            return None
        number: int = file.get(key, int)
        if not 0 <= number < len(self._tokens):
            raise EdgekitError(f"{file.path}: {key} = {number} is not in the vocabulary of {len(self._tokens)} tokens")
        return number


class TextStream:
    """The text of tokens that come one by one. Bytes of an unfinished character wait for the next token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, number: int) -> str:
        return self._decoder.decode(self._tokenizer.bytes_of(number))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


def _encoder(
    file: GgufFile, vocabulary: dict[str, int], merges: Sequence[str], rule: str, user_defined: Sequence[int]
) -> Any:
    """Return the byte-pair encoding. The vocabulary is without control tokens, so no text becomes one."""
    try:
        from tokenizers import AddedToken, Regex, pre_tokenizers
        from tokenizers import Tokenizer as Encoder
        from tokenizers.models import BPE
    except ImportError:
        raise missing_extra("tokenizers", "llm", "reading text") from None
    words = WORDS[rule]
    token_of = {number: token for token, number in vocabulary.items()}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        encoder = Encoder(BPE(vocabulary, pairs, ignore_merges=rule == "llama-bpe"))
        split: list[pre_tokenizers.PreTokenizer]
        if words is None:
            split = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
        else:
            split = [
                pre_tokenizers.Split(Regex(words), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        if rule == "smollm":
            split.insert(0, pre_tokenizers.Digits(individual_digits=True))
        encoder.pre_tokenizer = pre_tokenizers.Sequence(split)
        encoder.add_special_tokens([AddedToken(token_of[number], normalized=False) for number in user_defined])
    except Exception as error:  # the library raises bare exceptions
        raise EdgekitError(f"{file.path}: the tokenizer cannot be built ({error}); download the model again") from None
    return encoder


def _byte_letters() -> dict[str, int]:
    """Return the letter by which GPT-2's vocabulary writes each byte: itself where it is printable, else one from 256
    on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(other)}


_BYTES = _byte_letters()
