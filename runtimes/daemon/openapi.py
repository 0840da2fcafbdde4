"""The description of the daemon's own API (OpenAPI 3.1), for generated clients and for tools that test servers.

It is made of the constants that the requests are read with. `tests/runtimes/daemon/test_openapi.py` holds its fields
against those that are accepted, and its routes against those that are served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekit import __version__
from runtimes.daemon import embeddings, openai_requests, tensors
from runtimes.llm.chat import ROLES
from runtimes.llm.lookup import MOST_DRAFTS

Schema = dict[str, Any]
STREAM = "text/event-stream"


def document(language: Sequence[str], bundles: Sequence[str], most_answers: int, *, keys: bool) -> Schema:
    """Return the document. language, bundles: names of the models; keys: whether requests need one."""
    found: Schema = {
        "openapi": "3.1.0",
        "info": {"title": "edgekit serve", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": _paths(language, bundles, most_answers),
    }
    if keys:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
    return found


def _paths(language: Sequence[str], bundles: Sequence[str], most_answers: int) -> Schema:
    chat, completion = _chat(language, most_answers), _completion(language, most_answers)
    answer = _object({"choices": _array(_open()), "usage": _open()}, needed=("choices", "usage"), closed=False)
    one, models = _name(bundles), [*language, *bundles]
    described = _object({"name": _text(), "inputs": _array(_open()), "outputs": _array(_open())}, closed=False)
    paths = {
        "/": {"get": _operation("The page with models, memory and times", _media("text/html"), _v1())},
        "/healthz": {"get": _operation("Whether the daemon works", _json(_open()), _open())},
        "/readyz": {"get": _operation("Whether it takes requests", _json(_open()), _open())},
        "/metrics": {"get": _operation("Numbers for Prometheus", _media("text/plain"), _v1())},
        "/metrics/alerts": {"get": _operation("Numbers of the alerts", _media("text/plain"), _v1())},
        "/stats": {"get": _operation("Numbers as JSON", _json(_open()), _v1())},
        "/openapi.json": {"get": _operation("This document", _json(_open()), _v1())},
        "/v1/models": {"get": _operation("The models", _json(_open()), _v1())},
        "/v1/models/{name}": {"get": _operation("One model", _json(_open()), _v1(), [_name(models)])},
        "/v1/chat/completions": {"post": _operation("Answer a chat", _answers(answer), _v1(), body=chat)},
        "/v1/completions": {"post": _operation("Continue texts", _answers(answer), _v1(), body=completion)},
        "/v1/embeddings": {"post": _operation("Embed texts", _json(_open()), _v1(), body=_embedding(bundles))},
        "/v2": {"get": _operation("The server", _json(_open()), _v2())},
        "/v2/health/live": {"get": _operation("Whether the daemon works", _json(_open()), _open())},
        "/v2/health/ready": {"get": _operation("Whether it takes requests", _json(_open()), _open())},
    }
    version = {"name": "version", "in": "path", "required": True, "schema": {"enum": ["1"]}}
    for path, names in (("/v2/models/{name}", [one]), ("/v2/models/{name}/versions/{version}", [one, version])):
        paths[path] = {"get": _operation("Inputs and outputs of a bundle", _json(described), _v2(), names)}
        ready = [_name(models), *names[1:]]
        paths[f"{path}/ready"] = {"get": _operation("Whether a model can answer", _json(_open()), _v2(), ready)}
        infer = _operation("Run a bundle", _json(_open()), _v2(), [*names, BINARY], body=_infer())
        infer["responses"]["200"]["content"] |= _media("application/octet-stream")
        paths[f"{path}/infer"] = {"post": infer}
    return paths


# --- requests


def _common(language: Sequence[str], most_answers: int) -> dict[str, Schema]:
    whole = 1 << 30
    return {
        "model": {"enum": list(language)},
        "stream": _maybe({"type": "boolean"}),
        "stream_options": _maybe(
            _object(
                {"include_usage": _maybe({"type": "boolean"}), "include_obfuscation": _only(False)},
            )
        ),
        "max_tokens": _maybe(_whole(1, whole)),
        "temperature": _maybe(_number(0, 2)),
        "top_p": _maybe(_number(0, 1)),
        "top_k": _maybe(_whole(0, whole)),
        "min_p": _maybe(_number(0, 0.999)),
        "repetition_penalty": _maybe(_number(0.01, 100)),
        "seed": _maybe(_whole(-(1 << 63), (1 << 63) - 1)),
        "stop": _maybe(
            _text(1, openai_requests.LONGEST_STOP),
            _array(_text(1, openai_requests.LONGEST_STOP), most=openai_requests.MOST_STOPS),
        ),
        "n": _maybe(_whole(1, most_answers)),
        "priority": _maybe({"enum": list(openai_requests.PRIORITIES)}),
        "deadline_ms": _maybe(_number(1, 1e9)),
        "drafts": _maybe(_whole(0, MOST_DRAFTS)),
        "user": _maybe(_text()),
        "response_format": _maybe(
            _object({"type": {"enum": ["text", "json_object"]}}, needed=("type",)),
            _object(
                {
                    "type": {"const": "json_schema"},
                    "json_schema": _object(
                        {
                            "name": _maybe(_text()),
                            "description": _maybe(_text()),
                            "strict": _maybe({"type": "boolean"}),
                            "schema": _open(),
                        },
                        needed=("schema",),
                    ),
                },
                needed=("type", "json_schema"),
            ),
        ),
    }


def _chat(language: Sequence[str], most_answers: int) -> Schema:
    part = _object({"type": {"const": "text"}, "text": _text()}, needed=("type", "text"))
    content = {"anyOf": [_text(), _array(part)]}
    message = _object(
        {
            "role": {"enum": [*ROLES, "developer"]},
            "content": _maybe(content),
            "name": _maybe(_text()),
            "tool_call_id": _maybe(_text()),
            "tool_calls": _maybe(_array({})),
            "refusal": _only(None),
            "annotations": _only([]),
            "audio": _only(None),
        },
        needed=("role",),
    )
    message["anyOf"] = [
        {"required": ["content"], "properties": {"content": content}},
        {"required": ["tool_calls"], "properties": {"tool_calls": _array({})}},
    ]
    tool = _object({"type": {"const": "function"}, "function": _open()}, needed=("type", "function"), closed=False)
    return _object(
        _common(language, most_answers)
        | {
            "messages": _array(message, 1, openai_requests.MOST_MESSAGES),
            "max_completion_tokens": _maybe(_whole(1, 1 << 30)),
            "logprobs": _maybe({"type": "boolean"}),
            "top_logprobs": _maybe(_whole(0, openai_requests.MOST_LOGPROBS)),
            "tools": _maybe(_array(tool, most=openai_requests.MOST_TOOLS)),
            "tool_choice": _maybe({"enum": ["auto", "none"]}),
        }
        | _neutral(openai_requests.NEUTRAL),
        needed=("model", "messages"),
    )


def _completion(language: Sequence[str], most_answers: int) -> Schema:
    return _object(
        _common(language, most_answers)
        | {"prompt": _prompts(most_answers, least=1), "logprobs": _maybe(_whole(0, openai_requests.MOST_LOGPROBS))}
        | _neutral(openai_requests.NEUTRAL_COMPLETION),
        needed=("model", "prompt"),
    )


def _embedding(bundles: Sequence[str]) -> Schema:
    return _object(
        {
            "model": {"enum": list(bundles)},
            "input": _prompts(embeddings.MOST_TEXTS, least=1, longest=embeddings.LONGEST),
            "encoding_format": _maybe({"enum": ["float", "base64"]}),
            "dimensions": _only(None),
            "user": _maybe(_text()),
            "deadline_ms": _maybe(_number(1, 1e9)),
        },
        needed=("model", "input"),
    )


def _infer() -> Schema:
    axes = _array(_whole(0, (1 << 40) - 1), 1, tensors.MOST_AXES)
    common = {"name": _text(), "datatype": {"enum": list(tensors.DTYPES)}, "shape": axes}
    needed = tuple(common)
    as_json = _object(
        {**common, "data": _array({}), "parameters": _maybe(_object({"binary_data_size": _only(None)}))},
        needed=(*needed, "data"),
    )
    size = _object({"binary_data_size": _whole(0, 1 << 40)}, needed=("binary_data_size",))
    as_bytes = _object({**common, "data": _only(None), "parameters": size}, needed=(*needed, "parameters"))
    output = _object(
        {
            "name": _text(),
            "parameters": _maybe(
                _object({"binary_data": _maybe({"type": "boolean"}), "classification": _maybe(_only(0))})
            ),
        },
        needed=("name",),
    )
    parameters = _object(
        {
            "binary_data_output": _maybe({"type": "boolean"}),
            "timeout": _maybe(_number(0, 1e15)),
            "deadline_ms": _maybe(_number(1, 1e9)),
            "priority": _maybe(_only(0)),
            "sequence_id": _maybe(_only(0)),
        }
    )
    return _object(
        {
            "id": _maybe(_text()),
            "inputs": _array({"anyOf": [as_json, as_bytes]}),
            "outputs": _maybe(_array(output)),
            "parameters": _maybe(parameters),
        },
        needed=("inputs",),
    )


def _prompts(most: int, *, least: int = 0, longest: int | None = None) -> Schema:
    """Return the schema of one text, several, an array of token ids, or several."""
    ids, text = _array(_whole(0, (1 << 31) - 1), 1), _text(least, longest)
    return {"anyOf": [text, ids, _array({"anyOf": [text, ids]}, 1, most)]}


def _neutral(values: Mapping[str, Any]) -> dict[str, Schema]:
    """Return the schemas of fields that must have the value that changes nothing."""
    return {name: _maybe(_only(value)) for name, value in values.items()}


# --- parts of schemas


def _open() -> Schema:
    return {"type": "object"}


def _text(least: int = 0, most: int | None = None) -> Schema:
    return {"type": "string"} | ({"minLength": least} if least else {}) | ({} if most is None else {"maxLength": most})


def _whole(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _number(low: float, high: float) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def _array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    found: Schema = {"type": "array", "items": items}
    return found | ({"minItems": least} if least else {}) | ({} if most is None else {"maxItems": most})


def _only(value: Any) -> Schema:
    return {"const": value}


def _maybe(*schemas: Schema) -> Schema:
    """Null is as if the field were missing."""
    return {"anyOf": [*schemas, {"type": "null"}]}


def _object(properties: Mapping[str, Schema], needed: Sequence[str] = (), *, closed: bool = True) -> Schema:
    found: Schema = {"type": "object", "properties": dict(properties), "required": list(needed)}
    return found | ({"additionalProperties": False} if closed else {})


# --- operations


BINARY: Schema = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "required": False,
    "schema": {"type": "integer", "minimum": 0},
    "description": "Bytes of JSON at the beginning of the body, if bytes of tensors follow.",
}


def _name(names: Sequence[str]) -> Schema:
    return {"name": "name", "in": "path", "required": True, "schema": {"enum": list(names)}}


def _media(kind: str, schema: Schema | None = None) -> Schema:
    return {kind: {"schema": schema or {}}}


def _json(schema: Schema) -> Schema:
    return _media("application/json", schema)


def _answers(schema: Schema) -> Schema:
    return _json(schema) | _media(STREAM)


def _v1() -> Schema:
    error = _object(
        {"message": _text(), "type": _text(), "param": _maybe(_text()), "code": _text()},
        needed=("message", "type", "param", "code"),
    )
    return _object({"error": error}, needed=("error",))


def _v2() -> Schema:
    return _object({"error": _text()}, needed=("error",))


def _operation(
    summary: str, found: Schema, error: Schema, parameters: Sequence[Schema] = (), *, body: Schema | None = None
) -> Schema:
    """Return an operation. found, error: the schemas of answers with status 200, and with any other."""
    operation: Schema = {
        "summary": summary,
        "parameters": list(parameters),
        "responses": {
            "200": {"description": "The answer", "content": found},
            "default": {"description": "One line that names what is wrong", "content": _json(error)},
        },
    }
    if body is not None:
        operation["requestBody"] = {"required": True, "content": _json(body)}
    return operation
