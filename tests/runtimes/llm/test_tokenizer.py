"""Text to tokens and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm.tokenizer import TextStream, Tokenizer
from runtimes.llm.vocabulary import from_gguf
from tests.gguf_files import byte_letters, gguf, toy_metadata


def tokenizer_of(tmp_path, **metadata):
    given = toy_metadata("llama") | {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    path = tmp_path / "tokenizer.gguf"
    path.write_bytes(gguf({key: value for key, value in given.items() if value is not None}, {}))
    return Tokenizer(from_gguf(read_gguf(path)))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


@given(st.text(max_size=60))
def test_a_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_merges_are_applied_in_their_order(tokenizer):
    pieces = [tokenizer.bytes_of(number) for number in tokenizer.encode("then an in").tolist()]
    assert pieces == [b"the", b"n", b" ", b"an", b" ", b"in"]


def test_a_control_token_is_one_only_where_it_is_asked_for(tokenizer):
    assert len(tokenizer.encode("<|0|>")) > 1
    assert tokenizer.encode("<|0|>", special=True).tolist() == [261]
    assert tokenizer.decode([261, *tokenizer.encode("a").tolist()]) == "a"


@given(st.text(st.sampled_from("<|0>12 a\ufdd0\ufdd1"), max_size=30))
def test_a_guarded_text_has_no_control_token_and_is_otherwise_the_same(tokenizer, text):
    expected = tokenizer.encode(text).tolist()
    assert tokenizer.encode(tokenizer.guard(text), special=True).tolist() == expected
    framed = tokenizer.encode(f"<|1|>{tokenizer.guard(text)}<|2|>", special=True).tolist()
    assert framed == [262, *expected, 263]


def test_a_control_token_that_is_one_word_is_none_in_a_text(tmp_path):
    tokens = [*byte_letters(), "t", "STOP"]
    tokens[256] = "th"
    tokenizer = tokenizer_of(tmp_path, pre="llama-bpe", tokens=tokens, token_type=[1] * 257 + [3], merges=["t h"],
                             eos_token_id=257)  # fmt: skip
    assert tokenizer.encode("STOP").tolist() == [tokens.index(letter) for letter in "STOP"]
    assert tokenizer.encode("STOP", special=True).tolist() == [257]


def test_a_user_defined_token_is_one_in_every_text(tmp_path):
    types = [1] * 261 + [4] + [3] * 45
    tokenizer = tokenizer_of(tmp_path, token_type=types)
    for special in (False, True):
        assert tokenizer.encode("a<|0|>", special=special).tolist()[1:] == [261]
    assert tokenizer.decode([261]) == "<|0|>"


def test_llama_3_begins_a_text_with_its_token_unless_the_file_says_no(tmp_path):
    for rule, options, expected in (("llama-bpe", {}, True), ("llama-bpe", {"add_bos_token": False}, False),
                                    ("qwen2", {}, False)):  # fmt: skip
        tokenizer = tokenizer_of(tmp_path, pre=rule, bos_token_id=261, **options)
        assert (tokenizer.encode("a").tolist()[0] == 261) is expected


def test_a_character_that_spans_tokens_waits_for_its_last_byte(tokenizer):
    stream = TextStream(tokenizer)
    ids = tokenizer.encode("é").tolist()
    assert len(ids) == 2
    assert [stream.add(number) for number in ids] == ["", "é"]
    stream.add(ids[0])
    assert stream.end() == "�"


def test_a_beginning_is_added_once_where_the_model_wants_one(tmp_path):
    tokenizer = tokenizer_of(tmp_path, bos_token_id=261, add_bos_token=True)
    assert tokenizer.encode("a").tolist()[0] == 261
    assert tokenizer.encode("<|0|>a", special=True).tolist().count(261) == 1
    assert tokenizer.encode("a", begin=False).tolist()[0] != 261


@pytest.mark.parametrize(("rule", "text", "words"), [
    ("smollm", "in 123", 6), ("llama-bpe", "123", 3), ("qwen2", "123", 3), ("gpt-2", "an", 1), ("phi-2", "an", 1),
])  # fmt: skip
def test_each_rule_builds_a_tokenizer(tmp_path, rule, text, words):
    tokenizer = tokenizer_of(tmp_path, pre=rule)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert len(tokenizer.encode(text)) == words - (rule == "smollm")


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"model": "t5"}, "unknown tokenizer 't5'"),
        ({"pre": "strange"}, "unknown rule"),
        ({"pre": None}, "has no 'tokenizer.ggml.pre'"),
        ({"tokens": None}, "has no 'tokenizer.ggml.tokens'"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, "damaged"),
        ({"token_type": [1]}, "damaged"),
        ({"eos_token_id": 5000}, "not in the vocabulary"),
        ({"merges": ["x y z w"]}, "cannot be built"),
    ],
)
def test_a_damaged_vocabulary_is_refused(tmp_path, metadata, problem):
    with pytest.raises(EdgekitError, match=problem):
        tokenizer_of(tmp_path, **metadata)
