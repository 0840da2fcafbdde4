"""The vocabulary of a model, from a GGUF file or from tokenizer.json and its companions.

Both give the byte-pair encoding of Hugging Face's `tokenizers`. It is built without the control tokens, so that no text
becomes one by chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, missing_extra, unknown
from edgekit.importers.base import read_json
from edgekit.importers.gguf import GgufFile
from runtimes.llm.sentencepiece import SPACE, Pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens in a GGUF file
# the parts of tokenizer.json that edgekit gives to the library, behind the key of a sequence of them; others are for
# other encodings, and the library panics on some of a wrong content
PARTS = {
    "normalizer": ("normalizers", ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Strip")),
    "pre_tokenizer": ("pretokenizers", ("ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "Whitespace")),
    "post_processor": ("processors", ("ByteLevel", "TemplateProcessing")),
    "decoder": ("decoders", ("ByteFallback", "ByteLevel", "Fuse", "Replace", "Strip")),
}
MOST_TOKENS = 1 << 24
LARGEST_TOKENIZER = 64 << 20  # bytes of tokenizer.json; that of 262,144 tokens has 33 million

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# the words of each family, by the name that a GGUF file has for its rule; None: GPT-2's
WORDS: dict[str, str | None] = {
    "gpt-2": None,
    "phi-2": None,
    "smollm": None,  # after every digit became a word of its own
    "qwen2": rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}",
    "llama-bpe": rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """tokens: their texts as the file writes them; control: ids of tokens without text; added: of these and of those
    that are written as the text that they are; encode(text, first): the ids of plain text, which begins the whole
    text or follows a control token; spelling: the bytes of a token's text; ends: ids that end an answer; adds_bos:
    whether every text begins with `bos`; adds_space: whether every text begins with a space that was not in it;
    strips_left, strips_right: ids of control tokens that take the white space before or behind them."""

    tokens: Sequence[str]
    control: frozenset[int]
    added: frozenset[int]
    encode: Callable[..., list[int]]
    spelling: Callable[[str], bytes]
    bos: int | None
    eos: int | None
    ends: frozenset[int]
    adds_bos: bool
    adds_space: bool = False
    strips_left: frozenset[int] = frozenset()
    strips_right: frozenset[int] = frozenset()


# --- from a GGUF file


def from_gguf(file: GgufFile) -> Vocabulary:
    """Return the vocabulary of a GGUF file."""
    model = file.get("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise unknown("tokenizer", model, ["gpt2", "llama"], where=str(file.path))
    tokens: list[str] = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", np.ndarray, np.ones(len(tokens), np.int32))
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens) or not all(isinstance(t, str) for t in tokens):
        raise EdgekitError(f"{file.path}: the vocabulary is damaged; download the model again")
    return _of_pieces(file, tokens, types) if model == "llama" else _of_words(file, tokens, types)


def _of_words(file: GgufFile, tokens: list[str], types: Any) -> Vocabulary:
    """Return a vocabulary as GPT-2 has it: words by a rule, and merges of their bytes."""
    rule = file.get("tokenizer.ggml.pre", str)
    if rule not in WORDS:
        raise unknown("rule for words of the tokenizer", rule, WORDS, where=str(file.path))
    merges = file.get("tokenizer.ggml.merges", list)
    control = frozenset(np.flatnonzero(types == CONTROL).tolist())
    added = control | frozenset(np.flatnonzero(types == USER_DEFINED).tolist())
    plain = {token: number for number, token in enumerate(tokens) if number not in control}
    encoder = _byte_pairs(str(file.path), plain, merges, rule, [tokens[number] for number in sorted(added - control)])
    adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, rule == "llama-bpe")  # Llama 3's files leave it out
    bos, eos, ends = _ends_of(file, len(tokens))
    return Vocabulary(
        tokens, control, added, _encoding(encoder), byte_level, bos, eos, ends, adds_bos and bos is not None
    )


def _of_pieces(file: GgufFile, tokens: list[str], types: Any) -> Vocabulary:
    """Return a vocabulary as sentencepiece has it: pieces with scores, and bytes."""
    scores = file.get("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise EdgekitError(f"{file.path}: the scores of the vocabulary are damaged; download the model again")
    if file.get("tokenizer.ggml.remove_extra_whitespaces", bool, False):
        raise EdgekitError(f"{file.path}: the tokenizer joins white space, which edgekit does not do; use another file")
    numbers = {token: number for number, token in enumerate(tokens)}
    bytes_ = [numbers.get(f"<0x{byte:02X}>", -1) for byte in range(256)]
    if any(number < 0 or types[number] != BYTE for number in bytes_):
        bytes_ = []
    unknown_token = _named(file, "unknown", len(tokens))
    if not bytes_ and unknown_token is None:
        raise EdgekitError(f"{file.path}: the vocabulary has neither all bytes nor an unknown token; download it again")
    joined = {
        token: float(scores[number])
        for token, number in numbers.items()
        if types[number] in (NORMAL, USER_DEFINED, UNUSED)
    }
    adds_space = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    pieces = Pieces(
        joined,
        numbers,
        frozenset(token for token, number in numbers.items() if types[number] == UNUSED),
        [token for token, number in numbers.items() if types[number] == USER_DEFINED],
        bytes_,
        0 if unknown_token is None else unknown_token,
        adds_space,
    )
    control = frozenset(np.flatnonzero((types == CONTROL) | (types == UNKNOWN)).tolist())
    bos, eos, ends = _ends_of(file, len(tokens))
    adds_bos = file.get("tokenizer.ggml.add_bos_token", bool, True) and bos is not None
    return Vocabulary(
        tokens,
        control,
        control,
        lambda text, *, first: pieces.encode(text),
        sentencepiece,
        bos,
        eos,
        ends,
        adds_bos,
        adds_space,
    )


def _ends_of(file: GgufFile, size: int) -> tuple[int | None, int | None, frozenset[int]]:
    """Return bos, eos, and all ids that end an answer."""
    bos, eos, eot, eom = (_named(file, name, size) for name in ("bos", "eos", "eot", "eom"))
    return bos, eos, frozenset(number for number in (eos, eot, eom) if number is not None)


def _named(file: GgufFile, name: str, size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    if key not in file.metadata:
        return None
    number: int = file.get(key, int)
    if not 0 <= number < size:
        raise EdgekitError(f"{file.path}: {key} = {number} is not in the vocabulary of {size} tokens")
    return number


def _byte_pairs(
    where: str, vocabulary: dict[str, int], merges: Sequence[str], rule: str, user_defined: Sequence[str]
) -> Any:
    """Return the byte-pair encoding of GPT-2, with a family's rule for words."""
    library = _library()
    from tokenizers import AddedToken, Regex, models, pre_tokenizers

    words = WORDS[rule]
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    try:
        encoder = library.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=rule == "llama-bpe"))
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
        encoder.add_special_tokens([AddedToken(token, normalized=False) for token in user_defined])
    except Exception as error:  # the library raises bare exceptions
        raise EdgekitError(f"{where}: the tokenizer cannot be built ({error}); download the model again") from None
    return encoder


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise missing_extra("tokenizers", "llm", "reading text") from None
    return tokenizers


def _encoding(encoder: Any, behind: Any = None) -> Callable[..., list[int]]:
    """Return the function from text to ids. behind: for a text behind a control token, if it is another one."""

    def encode(text: str, *, first: bool) -> list[int]:
        chosen = encoder if first or behind is None else behind
        ids: list[int] = chosen.encode(text, add_special_tokens=False).ids
        return ids

    return encode


# --- from a folder that transformers saved


def from_folder(folder: Path, size: int) -> Vocabulary:
    """Return the vocabulary in tokenizer.json. size: rows of the embedding, which may have more than there are
    tokens."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise EdgekitError(
            f"{folder}: holds no tokenizer.json; save the model's tokenizer with AutoTokenizer and save_pretrained"
        )
    whole = read_json(path, LARGEST_TOKENIZER)
    if size > MOST_TOKENS:
        raise EdgekitError(f"{folder}: the embedding has {size:,} rows; edgekit takes up to {MOST_TOKENS:,} tokens")
    numbers, added = _numbers(path, whole, size)
    for key, (parts, allowed) in PARTS.items():
        _check_part(path, key, whole.get(key), parts, allowed)
    control = {entry["id"] for entry in added if entry["special"]}
    tokens = ["" for _ in range(size)]
    for token, number in numbers.items():
        tokens[number] = token
    unused = {number for number, token in enumerate(tokens) if not token}
    spelling = _spelling(path, whole.get("decoder"))
    model = {**whole["model"], "vocab": {t: n for t, n in whole["model"]["vocab"].items() if n not in control}}
    _check_merges(path, model)
    plain = {
        **whole,
        "model": model,
        "added_tokens": [entry for entry in added if not entry["special"]],
        "post_processor": None,
        "truncation": None,
        "padding": None,
    }
    metaspace = '"prepend_scheme": "first"'
    text = json.dumps(plain)
    later = text.replace(metaspace, '"prepend_scheme": "never"') if metaspace in text else None
    encode = _encoding(_built(path, text), None if later is None else _built(path, later))
    bos, eos, ends = _ends(folder, numbers, size)
    return Vocabulary(
        tokens,
        frozenset(control | unused),
        frozenset(control | unused | ({entry["id"] for entry in added} if spelling is byte_level else set())),
        encode,
        spelling,
        bos,
        eos,
        ends,
        _adds_bos(path, whole, bos),
        adds_space=_adds_space(encode, tokens),
        strips_left=frozenset(entry["id"] for entry in added if entry["special"] and entry.get("lstrip")),
        strips_right=frozenset(entry["id"] for entry in added if entry["special"] and entry.get("rstrip")),
    )


def _numbers(path: Path, whole: Mapping[str, Any], size: int) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """Return the id of each token, and the tokens that were added to the encoding's own."""
    model, added = whole.get("model"), whole.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(added, list):
        raise EdgekitError(f"{path}: has no model with a vocabulary and added_tokens; save the tokenizer again")
    if model.get("dropout"):
        raise EdgekitError(f"{path}: dropout = {repr(model['dropout'])[:40]} would make tokens random; expected null")
    if prefix := model.get("continuing_subword_prefix"):  # merges shorter than it would end the library's thread
        raise EdgekitError(f"{path}: continuing_subword_prefix = {repr(prefix)[:40]}; expected null or an empty text")
    if model.get("type") != "BPE":
        raise unknown("type of tokenizer", str(model.get("type")), ["BPE"], where=str(path))
    for entry in added:
        good = isinstance(entry, dict) and isinstance(entry.get("content"), str) and entry["content"]
        if not good or type(entry.get("id")) is not int or not isinstance(entry.get("special"), bool):
            raise EdgekitError(f"{path}: an added token is {repr(entry)[:60]}; expected an id, a content and `special`")
    numbers: dict[str, int] = {**model["vocab"], **{entry["content"]: entry["id"] for entry in added}}
    for token, number in (*model["vocab"].items(), *numbers.items()):
        if type(number) is not int or not 0 <= number < size:
            raise EdgekitError(f"{path}: {token[:40]!r} has the id {number!r}; the embedding has {size} rows")
    if len(set(numbers.values())) != len(numbers) or "" in numbers:
        raise EdgekitError(f"{path}: two tokens share an id, or one is empty; save the tokenizer again")
    return numbers, added


def _check_merges(path: Path, model: Mapping[str, Any]) -> None:
    """Raise unless each merge gives a token: a result longer than all tokens would end the library's thread."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise EdgekitError(f"{path}: merges is {repr(merges)[:40]}; expected a list of pairs")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        whole = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not whole or "".join(pair) not in model["vocab"]:
            raise EdgekitError(f"{path}: the merge {repr(merge)[:60]} gives no token of the vocabulary; save it again")


def _check_part(path: Path, key: str, part: Any, parts: str, allowed: Sequence[str], depth: int = 0) -> None:
    """Raise if a part of tokenizer.json is of a type that is not allowed."""
    if part is None and depth == 0:
        return
    name = part.get("type") if isinstance(part, dict) else part
    if name == "Sequence" and depth < 4 and isinstance(part.get(parts), list):
        for item in part[parts]:
            _check_part(path, key, item, parts, allowed, depth + 1)
    elif name not in allowed:
        raise unknown(f"type of {key}", repr(name)[1:40].rstrip("'"), allowed, where=str(path))


def _built(path: Path, text: str) -> Any:
    library = _library()
    try:
        return library.Tokenizer.from_str(text)
    except BaseException as error:  # the library raises bare exceptions, and panics are no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise EdgekitError(f"{path}: the tokenizer cannot be built ({reason}); save it again") from None


def _spelling(path: Path, decoder: Any) -> Callable[[str], bytes]:
    """Return how tokens are written, by the part of tokenizer.json that turns them into text."""
    parts = decoder.get("decoders", [decoder]) if isinstance(decoder, dict) else []
    names = {part.get("type") for part in parts if isinstance(part, dict)} if isinstance(parts, list) else set()
    if names == {"ByteLevel"}:
        return byte_level
    if {"ByteFallback", "Replace"} <= names <= {"ByteFallback", "Replace", "Fuse", "Strip"}:
        return sentencepiece
    raise EdgekitError(
        f"{path}: the decoder is {', '.join(sorted(map(str, names))) or 'missing'}; edgekit reads ByteLevel, and "
        "Replace with ByteFallback"
    )


def _adds_bos(path: Path, whole: Mapping[str, Any], bos: int | None) -> bool:
    """Whether the tokenizer puts bos before a text. Raises if it adds other tokens, too."""
    ids: list[int] = _built(path, json.dumps(whole)).encode("").ids
    if ids not in ([], [bos]):
        raise EdgekitError(f"{path}: adds the tokens {ids[:8]} to every text; edgekit adds bos ({bos}) or nothing")
    return bool(ids)


def _adds_space(encode: Callable[..., list[int]], tokens: Sequence[str]) -> bool:
    first = encode("a", first=True)
    return bool(first) and tokens[first[0]].startswith(SPACE)


def _ends(folder: Path, numbers: Mapping[str, int], size: int) -> tuple[int | None, int | None, frozenset[int]]:
    """Return bos, eos, and all ids that end an answer, from the files beside tokenizer.json."""
    names = _optional(folder / "tokenizer_config.json")
    config, generation = _optional(folder / "config.json"), _optional(folder / "generation_config.json")

    def ids(key: str, values: Mapping[str, Any]) -> list[int]:
        given = values.get(key)
        found = given if isinstance(given, list) else [] if given is None else [given]
        if any(type(number) is not int for number in found):
            raise EdgekitError(f"{folder}: {key} = {repr(given)[:40]}; expected token ids")
        return [number for number in found if 0 <= number < size]  # a tiny model may keep the ids of a large one

    def named(key: str) -> int | None:
        token = names.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in numbers:
            return numbers[token]
        return next(iter([*ids(f"{key}_token_id", generation), *ids(f"{key}_token_id", config)]), None)

    bos, eos = named("bos"), named("eos")
    ends = {*ids("eos_token_id", generation), *ids("eos_token_id", config), *([] if eos is None else [eos])}
    return bos, eos, frozenset(ends)


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# --- how tokens are written


def byte_level(text: str) -> bytes:
    """Return the bytes of a token that is written as GPT-2's are, with a letter for each byte."""
    return b"".join(bytes([_BYTES[letter]]) if letter in _BYTES else letter.encode() for letter in text)


def sentencepiece(text: str) -> bytes:
    """Return the bytes of a token that is written as sentencepiece's are: <0x0A> is a byte."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            pass
    return text.replace(SPACE, " ").encode()


def _byte_letters() -> dict[str, int]:
    """Return the letter by which GPT-2's vocabulary writes each byte: itself where it is printable, else one from 256
    on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + number): byte for number, byte in enumerate(other)}


_BYTES = _byte_letters()
