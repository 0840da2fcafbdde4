"""OpenAI's API, by the official client and by hand."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtimes.llm.model import load

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


LONG = {**CHAT, "max_tokens": 1500, "temperature": 1, "seed": 3, "drafts": 0}  # 293 tokens


@pytest.fixture(scope="module")
def client(running):
    openai = pytest.importorskip("openai", reason="pip install openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def reference(model_files):
    with load(model_files[0], engine="torch", context=2048) as found:
        yield found


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["toy", "tiny"]
    assert client.models.retrieve("toy").owned_by == "edgekit"


def test_a_chat_is_what_the_model_answers(client, reference):
    message = {"role": "user", "content": "Which planet <|1|> is the largest?"}
    answer = client.chat.completions.create(
        model="toy", messages=[message], temperature=0, max_tokens=12, extra_body={"drafts": 0}
    )
    assert answer.choices[0].message.content == "".join(reference.chat([message], most_tokens=12, drafts=0))
    assert answer.choices[0].finish_reason == "length"
    prompt = len(reference.chat_prompt([message]))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 12)


def test_a_stream_is_the_same_text(client):
    options = {**CHAT, "seed": 3, "temperature": 1, "max_tokens": 40}
    whole = client.chat.completions.create(**options).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**options, stream=True)
        if chunk.choices
    ]
    assert len(pieces) > 10
    assert "".join(pieces) == whole


def test_a_stream_has_role_end_and_usage(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**CHAT, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == 8
    assert not any(chunk.usage for chunk in client.chat.completions.create(**CHAT, stream=True))


def test_logprobs_are_those_of_the_model(client, reference):
    options = {**CHAT, "logprobs": True, "top_logprobs": 3}
    content = client.chat.completions.create(**options).choices[0].logprobs.content
    assert len(content) == 8
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)  # the most probable was taken
    answer = client.completions.create(model="toy", prompt="the in an", max_tokens=5, temperature=0, logprobs=2)
    (expected,) = reference.answers("the in an", most_tokens=5, logprobs=2)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].logprobs.token_logprobs == pytest.approx([token.logprob for token in expected.tokens])


def test_several_answers_and_prompts(client, reference):
    from runtimes.llm.sampling import Sampling

    answer = client.completions.create(model="toy", prompt="the", max_tokens=6, n=3, seed=5, temperature=1)
    expected = reference.answers("the", n=3, most_tokens=6, sampling=Sampling(temperature=1, seed=5))
    assert [choice.text for choice in answer.choices] == [item.text for item in expected]
    ids = [reference.tokenizer.encode(text).tolist() for text in ("an", "re")]
    answer = client.completions.create(model="toy", prompt=ids, max_tokens=4, temperature=0)
    texts = ["".join(reference.complete(text, most_tokens=4)) for text in ("an", "re")]
    assert [choice.text for choice in answer.choices] == texts


def test_a_schema_is_obeyed(client):
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "thing", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            **{**CHAT, "max_tokens": 60, "temperature": 1, "seed": seed}, response_format=form
        )
        assert json.loads(answer.choices[0].message.content) in ({"a": "x"}, {"a": "y"})
        assert answer.choices[0].finish_reason == "stop"


def test_a_stop_text_ends_an_answer(client):
    options = {**CHAT, "max_tokens": 60, "temperature": 1, "seed": 9}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole[10:12]
    answer = client.chat.completions.create(**options, stop=[stop, "never"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 60


def test_concurrent_requests_share_steps_and_get_their_own_answers(running, client):
    def ask(seed):
        options = {**CHAT, "max_tokens": 30, "temperature": 1, "seed": seed}
        return client.chat.completions.create(**options).choices[0].message.content

    alone = [ask(seed) for seed in range(8)]
    steps = running.queue().engine.steps
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(8))) == alone
    assert running.queue().engine.steps - steps < 8 * 30 / 2
    assert running.settled()


def test_priority_and_deadline(running, slow):
    assert running.post("/v1/chat/completions", {**CHAT, "priority": "batch", "deadline_ms": 60000}).status == 200
    late = {**LONG, "deadline_ms": 40}
    assert running.post("/v1/chat/completions", late).refused(504, "deadline")
    assert running.settled()


def test_a_deadline_in_a_stream_is_an_error_event(running, slow):
    answer = running.post("/v1/chat/completions", {**LONG, "deadline_ms": 600, "stream": True})
    assert answer.status == 200
    last = answer.content.decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
    assert running.settled()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_gives_its_blocks_back(running, slow, stream):
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(head.encode() + body)
        until = time.monotonic() + 10
        while running.queue().engine.blocks.free == running.queue().engine.blocks.number:
            assert time.monotonic() < until
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    began = time.monotonic()
    assert running.settled()
    assert time.monotonic() - began < 3  # and not after 1,500 tokens
    assert running.daemon.stats.snapshot(["toy"])[0]["toy"].ended["cancelled"] >= 1


def test_tools_go_through_the_template(start, model_files, tmp_path):
    from runtimes.daemon.config import ModelSettings
    from tests.gguf_files import encoded, gguf, toy_metadata, toy_weights  # a model whose template knows tools

    weights = toy_weights("llama")
    tensors = {name: ("F32", value.shape, encoded(value, "F32")) for name, value in weights.items()}
    template = (
        "{% for t in tools %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.id }}{% endfor %}{% endfor %}"
    )
    path = tmp_path / "tools.gguf"
    path.write_bytes(gguf(toy_metadata("llama") | {"tokenizer.chat_template": template}, tensors))
    models = {"tools": ModelSettings(path=str(path), engine="torch", context=512)}
    tool = {"type": "function", "function": {"name": "f", "description": "<|0|> é"}}
    with start(models=models) as running:
        given = {**CHAT, "model": "tools", "max_tokens": 1}
        without = running.post("/v1/chat/completions", given).json["usage"]["prompt_tokens"]
        with_tools = running.post("/v1/chat/completions", {**given, "tools": [tool]}).json["usage"]["prompt_tokens"]
        language = running.daemon.models.entries["tools"].loaded
        text = json.dumps(tool, ensure_ascii=False)
        assert with_tools - without == len(language.model.tokenizer.encode(text))  # <|0|> stays plain text
        assert (
            running.post("/v1/chat/completions", {**given, "tools": [tool], "tool_choice": "none"}).json["usage"][
                "prompt_tokens"
            ]
            == without
        )
        call = {"role": "assistant", "content": None, "tool_calls": [{"id": "abc"}]}
        result = {"role": "tool", "content": "5", "tool_call_id": "abc"}
        assert (
            running.post("/v1/chat/completions", {**given, "messages": [*given["messages"], call, result]}).status
            == 200
        )
        assert running.post("/v1/chat/completions", {**CHAT, "tools": [tool]}).refused(400, "no place for tools")


REFUSED = [
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"logit_bias": {"1": 2}}, "logit_bias is not supported"),
    ({"functions": []}, "functions is not supported"),
    ({"temprature": 1}, "did you mean 'temperature'"),
    ({"temperature": 3}, "temperature = 3; expected 0 to 2"),
    ({"temperature": "hot"}, "expected a whole number or a number"),
    ({"temperature": True}, "expected a whole number or a number"),
    ({"top_p": -1}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 1.5}, "expected a whole number"),
    ({"max_tokens": 5000}, "the model's context here is 2048"),
    ({"max_completion_tokens": 5}, "send one of them"),
    ({"n": 2}, "temperature = 0"),
    ({"n": 99}, "n = 99"),
    ({"seed": 1 << 80}, "seed"),
    ({"stop": [""]}, "texts of 1 to 256"),
    ({"stop": ["a"] * 10**6}, "1000000 texts"),
    ({"stop": {"a": 1}}, "expected a text or an array"),
    ({"model": "none"}, "unknown model 'none'"),
    ({"model": "tiny"}, "answers at /v2/models"),
    ({"model": None}, "model is missing"),
    ({"messages": []}, "expected 1 to"),
    ({"messages": "hi"}, "expected an array"),
    ({"messages": [1]}, "messages[0] is no object"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"messages": [{"role": "user", "content": "x", "audio": {}}]}, "messages[0].audio"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "takes texts alone"),
    ({"messages": [{"role": "user", "content": "a " * 10**6}]}, "characters"),
    ({"messages": [{"role": "user", "content": "a b " * 900}]}, "context"),
    ({"tools": [{"type": "x"}]}, "tools[0]"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}, "JSON schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://x/y"}}}}, "JSON schema"),
    ({"response_format": {"type": "json_object", "x": 1}}, "response_format"),
    ({"logprobs": 3}, "expected true or false"),
    ({"top_logprobs": 3}, "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 50}, "0 to 20"),
    ({"stream_options": {}}, "needs stream"),
    ({"stream": True, "stream_options": {"include": 1}}, "stream_options"),
    ({"priority": "urgent"}, "interactive, batch"),
    ({"deadline_ms": -5}, "deadline_ms"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(running, change, words):
    answer = running.post("/v1/chat/completions", {**CHAT, **change})
    assert answer.refused(404 if "unknown model" in words else 400, words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "an array; expected an object"),
        (b'{"model": NaN}', "NaN is no number"),
        (b'{"temperature": 1e999}', "1e999 is no number"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "levels deep"),
        (b'{"a": ' * 100 + b"1" + b"}" * 100, "levels deep"),
        (b"\xff\xfe{", "not valid JSON"),
        (b'{"model": "toy", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
    ],
)
def test_a_body_that_is_no_request(running, body, words):
    assert running.post("/v1/chat/completions", body).refused(400, words)


def test_completions_refuse_their_own(running):
    def ask(**change):
        return running.post("/v1/completions", {"model": "toy", "prompt": "a", "max_tokens": 2, **change})

    assert ask(echo=True).refused(400, "echo is not supported")
    assert ask(suffix="x").refused(400, "suffix")
    assert ask(best_of=3).refused(400, "best_of")
    assert ask(prompt=[]).refused(400, "prompt has 0")
    assert ask(prompt=["a"] * 9).refused(400, "prompt has 9")
    assert ask(prompt=["a", 1]).refused(400, "prompt = 1")
    assert ask(prompt=[10**6]).refused(400, "token id")
    assert ask(prompt=[-1]).refused(400, "prompt")
    assert ask(prompt="").refused(400, "at least 1")
    assert ask(echo=False, suffix=None, best_of=1).status == 200


def test_the_queue_is_bounded(start, monkeypatch):
    with start(limits={"queue": 2}) as running:
        running.slow_down(monkeypatch)
        statuses, lock = [], threading.Lock()

        def ask():
            answer = running.post("/v1/chat/completions", {**LONG, "max_tokens": 60})
            with lock:
                statuses.append((answer.status, answer.headers.get("retry-after")))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(statuses, key=str) == [(200, None), (200, None), (503, "1"), (503, "1")]
        assert running.settled()
