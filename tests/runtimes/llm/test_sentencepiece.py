"""Vocabularies of sentencepiece in GGUF files, against the sentencepiece package."""

import io
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm import vocabulary
from runtimes.llm.tokenizer import Tokenizer
from tests.gguf_files import gguf

sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece")
LICENSE = (Path(__file__).parents[3] / "LICENSE").read_text()
OPTIONS = {
    "like Llama": {},
    "like Gemma": {"add_dummy_prefix": False, "user_defined_symbols": ["\n\n", "▁▁", "▁▁▁▁", "<b>"]},
    "across words": {"split_by_whitespace": False, "vocab_size": 700},
    "without bytes": {"byte_fallback": False, "vocab_size": 300},
}


def trained(**options):
    """A model of sentencepiece that was trained on the licence, and on runs of one letter and of spaces."""
    lines = [*LICENSE.splitlines(), *("a" * n + " " * n + "ab" * n + "aab" * n for n in range(2, 30))] * 3
    lines += ["    if x:", "        return    aaaa"] * 40
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=made,
        **{
            "vocab_size": 600,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "minloglevel": 2,
            **options,
        },
    )
    return sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def has_bytes(model):
    return any(model.is_byte(number) for number in range(model.get_piece_size()))


def floats(values):
    return struct.pack("<IIQ", 9, 6, len(values)) + np.array(values, "<f4").tobytes()


def metadata_of(model, options, **changes):
    size = model.get_piece_size()
    tokens = [model.id_to_piece(number) for number in range(size)]

    def code(number):
        if model.is_unknown(number):
            return vocabulary.UNKNOWN
        if model.is_control(number):
            return vocabulary.CONTROL
        if tokens[number] in options.get("user_defined_symbols", ()):
            return vocabulary.USER_DEFINED
        return vocabulary.BYTE if model.is_byte(number) else vocabulary.NORMAL

    given = {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "scores": floats([model.get_score(number) for number in range(size)]),
        "token_type": [code(number) for number in range(size)],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
        "add_space_prefix": options.get("add_dummy_prefix", True),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in given.items() if value is not None}


def tokenizer_of(path, metadata):
    path.write_bytes(gguf({"general.architecture": "llama", **metadata}, {}))
    return Tokenizer(vocabulary.from_gguf(read_gguf(path)))


@pytest.fixture(scope="module", params=OPTIONS)
def pair(request, tmp_path_factory):
    """A model of sentencepiece, and the tokenizer of a GGUF file with its vocabulary."""
    options = OPTIONS[request.param]
    model = trained(**options)
    path = tmp_path_factory.mktemp("pieces") / "m.gguf"
    return model, tokenizer_of(path, metadata_of(model, options))


TEXTS = [
    LICENSE,
    "a" * 57,
    "ab" * 20 + "aab" * 13,
    " " * 33,
    "  two   spaces  ",
    "\n\n\n x \n\n",
    "\tif x:\n        return",
    "",
    " ",
    "12,345.67 été 日本語 🌌",
    "<b>bold</b> <s> </s> <0x41> <unk>",
    "▁ literal ▁▁",
    "I'm, they'll",
    "\u0000\u0007",
]


def test_texts_have_the_ids_that_sentencepiece_gives(pair):
    model, tokenizer = pair
    for item in TEXTS:
        assert tokenizer.encode(item, begin=False).tolist() == model.encode(item)
        if has_bytes(model):  # without bytes, what has no piece is lost
            assert tokenizer.decode(tokenizer.encode(item).tolist()) == item.replace("▁", " ")


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab \n<b>xréあ▁12"), max_size=40))
def test_random_texts_have_the_ids_that_sentencepiece_gives(pair, item):
    model, tokenizer = pair
    assert tokenizer.encode(item, begin=False).tolist() == model.encode(item)


def test_the_leftmost_of_equal_scores_is_joined_first(pair):
    """With the rightmost one first, or with scores that are a little different, other ids come out."""
    model, tokenizer = pair
    pieces = tokenizer._vocabulary.encode.__closure__[0].cell_contents
    rng = random.Random(5)
    drawn = ["".join(rng.choices("ab ", k=30)) for _ in range(50)]
    right = [pieces.encode(item) for item in drawn]
    assert right == [model.encode(item) for item in drawn]
    kept = dict(pieces._scores)
    pieces._known.clear()
    pieces._scores = {piece: score + 40 * rng.random() for piece, score in kept.items()}
    assert [pieces.encode(item) for item in drawn] != right
    pieces._scores = kept
    pieces._known.clear()


def test_words_that_are_remembered_are_the_same_again(pair):
    _, tokenizer = pair
    first = tokenizer.encode(LICENSE).tolist()
    assert tokenizer.encode(LICENSE).tolist() == first


def test_bos_comes_first_and_control_tokens_only_where_they_are_asked_for(pair):
    model, tokenizer = pair
    assert tokenizer.encode("a").tolist() == [model.bos_id(), *model.encode("a")]
    special = tokenizer.encode("a</s>b", special=True, begin=False).tolist()
    assert special == [*model.encode("a"), model.eos_id(), *model.encode("b")]
    assert model.eos_id() not in tokenizer.encode("a</s>b").tolist()
    guarded = tokenizer.encode(tokenizer.guard("a</s>b"), special=True, begin=False).tolist()
    assert guarded == tokenizer.encode("a</s>b", begin=False).tolist()
    assert tokenizer.ends == {model.eos_id()}


def test_unused_pieces_are_only_steps(tmp_path):
    """The piece of two letters is joined on the way to that of four, and is written as letters where it is left."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "abab"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": floats([0, 0, 0, -3, -4, -1, -2]),
        "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 5, 1],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = tokenizer_of(tmp_path / "m.gguf", metadata)
    assert tokenizer.encode("abab").tolist() == [6]
    assert tokenizer.encode("ababab").tolist() == [6, 3, 4]
    assert tokenizer.encode("xyabz").tolist() == [0, 3, 4, 0]


def test_the_folder_that_transformers_makes_of_it_gives_the_same(pair, tmp_path):
    """tokenizer.json with merges by rank, as transformers writes it for sentencepiece, on texts without long runs."""
    model, tokenizer = pair
    if not has_bytes(model) or model.get_piece_size() > 600:
        pytest.skip("transformers writes no tokenizer.json for this vocabulary that gives sentencepiece's ids")
    size = model.get_piece_size()
    vocab = {model.id_to_piece(number): number for number in range(size)}
    merges = sorted(
        (-model.get_score(number), piece[:at], piece[at:])
        for piece, number in vocab.items()
        for at in range(1, len(piece))
        if not (model.is_byte(number) or model.is_control(number)) and {piece[:at], piece[at:]} <= vocab.keys()
    )
    adds = tokenizer._vocabulary.adds_space
    added = [
        {
            "id": n,
            "content": model.id_to_piece(n),
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for n in range(3)
    ]
    added += [
        entry | {"id": vocab[piece], "content": piece, "special": False}
        for entry in added[:1]
        for piece in OPTIONS["like Gemma"]["user_defined_symbols"]
        if not adds
    ]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": [prepend, spaces] if adds else [spaces]},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    other = Tokenizer(vocabulary.from_folder(tmp_path, size))
    for item in (
        "A transient is an object",
        "12,345.67 été 日本語 🌌",
        "I'm, they'll\n",
        LICENSE[:3000].replace("  ", ""),
    ):
        ids = tokenizer.encode(item, begin=False).tolist()
        assert other.encode(item).tolist() == ids
        assert other.decode(ids) == tokenizer.decode(ids) == item


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"scores": None}, r"has no 'tokenizer\.ggml\.scores'"),
        ({"scores": floats([1.0])}, "scores of the vocabulary are damaged"),
        ({"scores": floats([float("nan")] * 600)}, "scores of the vocabulary are damaged"),
        ({"unknown_token_id": 9999}, "is not in the vocabulary"),
        ({"remove_extra_whitespaces": True}, "joins white space"),
        ({"token_type": [1] * 600, "unknown_token_id": None}, "neither all bytes nor an unknown token"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, changes, problem):
    metadata = metadata_of(trained(), {}, **changes)
    with pytest.raises(EdgekitError, match=problem):
        tokenizer_of(tmp_path / "m.gguf", metadata)
