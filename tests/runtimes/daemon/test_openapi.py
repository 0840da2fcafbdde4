"""The document of the daemon's API: its routes and fields are those that are served, and requests that schemathesis
makes up from it are answered as it says."""

import copy
import json
import os
import subprocess
import sys

import pytest

from runtimes.daemon import embeddings, openai_requests, openapi

CHAT = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": "toy", "prompt": "a", "max_tokens": 1},
}


@pytest.fixture(scope="module")
def document(running):
    return running.get("/openapi.json").json


def body_of(document, path):
    return document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]


def test_it_has_every_route_with_its_methods(running, document):
    served = {
        (route.path, method.lower()) for route in running.daemon._router.routes for method in route.methods - {"HEAD"}
    }
    assert {(path, method) for path, item in document["paths"].items() for method in item} == served


def test_it_has_every_field_that_is_read(document):
    fields = {
        "/v1/chat/completions": {*openai_requests.CHAT, *openai_requests.NEUTRAL},
        "/v1/completions": {*openai_requests.COMPLETION, *openai_requests.NEUTRAL_COMPLETION},
        "/v1/embeddings": {*embeddings.FIELDS, "dimensions"},
        "/v2/models/{name}/infer": {"id", "inputs", "outputs", "parameters"},
    }
    for path, known in fields.items():
        assert set(body_of(document, path)["properties"]) == known, path


def limits(schema):
    """(value that is allowed, value that is not) for each bound of a number or a list in a schema."""
    for item in schema.get("anyOf", [schema]):
        if item.get("type") in ("integer", "number"):
            yield item["minimum"], item["minimum"] - 1
            yield item["maximum"], item["maximum"] * 2 + 1
        if "enum" in item:
            yield from ((value, "no such value") for value in item["enum"])
        if "const" in item:
            yield item["const"], {"no": "such value"}


@pytest.mark.parametrize("path", BODIES)
def test_every_bound_is_the_one_that_is_checked(running, document, path):
    """What the document allows is read, and what lies outside is refused with the field's name."""
    read = {"/v1/chat/completions": openai_requests.chat_request, "/v1/completions": openai_requests.completion_request}
    known = running.daemon.config.limits.answers
    checked = 0
    for name, schema in body_of(document, path)["properties"].items():
        for good, bad in limits(schema):
            body = {**BODIES[path], "temperature": 1.0, name: good}
            if name == "max_completion_tokens":
                del body["max_tokens"]
            if name == "top_logprobs":
                body["logprobs"] = True
            read[path](body, known)
            if name != "model":  # whose names another part checks
                with pytest.raises(openai_requests.RefusedError, match=name):
                    read[path]({**body, name: bad}, known)
            checked += 1
    assert checked > 25


def test_a_wrong_method_is_told_the_right_ones(running):
    answer = running.get("/v1/chat/completions")
    assert answer.refused(405, "Method Not Allowed")
    assert answer.headers["allow"] == "POST"


def test_keys_are_in_it_if_there_are_any():
    assert "security" not in openapi.document(["a"], ["b"], 8, keys=False)
    assert openapi.document(["a"], ["b"], 8, keys=True)["security"] == [{"key": []}]


# --- requests that schemathesis makes up

STATED = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
CHECKS = f"{STATED},negative_data_rejection,unsupported_method"


def schemathesis(url, document, folder, *, examples, checks=CHECKS):
    """Return the exit status and what it printed."""
    (folder / "openapi.json").write_text(json.dumps(document))
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url),
        *("--checks", checks, "--max-examples", str(examples), "--seed", "1", "--workers", "1"),
        *("--phases", "examples,coverage,fuzzing", "--generation-database", "none", "--request-timeout", "60"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1500, cwd=folder, env={**os.environ, "COLUMNS": "160"}
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.api
def test_no_request_that_schemathesis_makes_up_is_answered_otherwise(running, document, tmp_path):
    pytest.importorskip("schemathesis", reason="make test-api installs it")
    patient = copy.deepcopy(document)
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):  # else 504 is a true answer
        body_of(patient, path)["properties"]["deadline_ms"] = {"type": "number", "minimum": 6e5, "maximum": 1e9}
    for path in ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer"):
        body_of(patient, path)["properties"]["parameters"] = {"const": {"binary_data_output": True}}
    status, told = schemathesis(running.url, patient, tmp_path, examples=25)
    assert status == 0, told[-30000:]
    assert running.settled()


def answers_of_another_form(document):
    document["/healthz"]["get"]["responses"]["200"]["content"]["application/json"]["schema"] = {"type": "array"}


def a_status_that_is_not_in_it(document):
    del document["/v1/completions"]["post"]["responses"]["default"]


def a_bound_that_nobody_checks(document):
    schema = document["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fixed = {name: {"const": value} for name, value in BODIES["/v1/completions"].items()}
    schema["properties"] = {**fixed, "temperature": {"type": "number", "minimum": 0, "maximum": 1}}
    schema["required"] = list(schema["properties"])


@pytest.mark.api
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (answers_of_another_form, "Response violates schema"),
        (a_status_that_is_not_in_it, "Undocumented status code"),
        (a_bound_that_nobody_checks, "Schema-violating request accepted"),
    ],
)
def test_planted_differences_are_found(running, document, tmp_path, plant, words):
    pytest.importorskip("schemathesis", reason="make test-api installs it")
    wrong = copy.deepcopy(document)
    wrong["paths"] = {path: wrong["paths"][path] for path in ("/healthz", "/v1/completions")}
    plant(wrong["paths"])
    status, told = schemathesis(running.url, wrong, tmp_path, examples=25)
    assert status == 1, told[-3000:]
    assert words in told, told[-3000:]
