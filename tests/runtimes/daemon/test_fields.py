"""Whatever JSON a client sends, it is a request or is refused in one line."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from runtimes.daemon import embeddings, tensors
from runtimes.daemon.fields import DEEPEST, Fields, parse
from runtimes.daemon.openai_requests import CHAT, COMPLETION, NEUTRAL, chat_request, completion_request
from runtimes.daemon.refusal import RefusedError, from_error

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "tool", "x"]) | VALUES, "content": st.text() | VALUES}
)
KNOWN = {
    "model": st.text() | VALUES,
    "messages": st.lists(MESSAGE | VALUES, max_size=3) | VALUES,
    "prompt": st.text() | st.lists(st.integers() | st.text(), max_size=3) | VALUES,
    "input": st.text() | VALUES,
    "stop": st.lists(st.text(), max_size=3) | VALUES,
    "response_format": st.fixed_dictionaries({"type": st.just("json_schema"), "json_schema": VALUES}) | VALUES,
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": VALUES})) | VALUES,
    "inputs": st.lists(
        st.fixed_dictionaries(
            {
                "name": st.text() | VALUES,
                "datatype": st.sampled_from(["FP32", "INT8", "BOOL"]) | VALUES,
                "shape": st.lists(st.integers(0, 4), max_size=3) | VALUES,
                "data": st.lists(st.integers() | st.floats(), max_size=4) | VALUES,
            }
        ),
        max_size=2,
    )
    | VALUES,
}


def bodies(fields):
    optional = {name: KNOWN.get(name, VALUES) for name in fields}
    return st.fixed_dictionaries({}, optional=optional) | st.dictionaries(st.text(), VALUES, max_size=3)


def one_line(error):
    assert 400 <= error.status < 500
    assert "\n" not in str(error)
    assert len(str(error)) <= 600
    json.dumps(error.as_openai()).encode()


@pytest.mark.parametrize(
    ("read", "fields"),
    [
        (lambda body: chat_request(body, 8), (*CHAT, *NEUTRAL)),
        (lambda body: completion_request(body, 8), COMPLETION),
        (embeddings.request, embeddings.FIELDS),
        (
            lambda body: tensors.read(json.dumps(body, allow_nan=True).encode(), None),
            ("inputs", "outputs", "parameters"),
        ),
    ],
    ids=["chat", "completion", "embeddings", "tensors"],
)
def test_any_json_is_a_request_or_is_refused(read, fields):
    @hypothesis.settings(max_examples=150, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(bodies(fields))
    def check(body):
        try:
            read(body)
        except RefusedError as error:
            one_line(error)

    check()


@hypothesis.given(st.binary(max_size=80))
def test_any_bytes_are_an_object_or_are_refused(content):
    try:
        assert isinstance(parse(content), dict)
    except RefusedError as error:
        one_line(error)


def test_a_request_that_is_right_is_taken():
    found = chat_request(
        {"model": "a", "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}]}, 8
    )
    assert found.messages == [{"role": "system", "content": "x"}]
    assert (found.wanted.sampling.temperature, found.wanted.answers, found.wanted.interactive) == (1.0, 1, True)
    assert chat_request({"model": "a", "messages": [{"role": "user", "content": "x"}], "temperature": None}, 8)


def test_depth_is_bounded_and_not_less_than_it_says():
    inner = "1"
    for _ in range(DEEPEST - 1):
        inner = f"[{inner}]"
    assert parse(f'{{"a": {inner}}}'.encode())
    with pytest.raises(RefusedError, match="levels deep"):
        parse(f'{{"a": [{inner}]}}'.encode())


def test_an_error_of_the_program_tells_a_client_nothing():
    found = from_error(RuntimeError("/secret/path"))
    assert (found.status, found.code) == (500, "internal_error")
    assert "secret" not in str(found)


def test_a_text_of_a_client_is_cut_in_an_error():
    with pytest.raises(RefusedError) as found:
        Fields({"x" * 10_000: 1}).finish(("model",))
    assert len(str(found.value)) < 300
