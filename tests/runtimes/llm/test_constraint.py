"""Constraints: whatever the weights are, an answer obeys its schema or its regular expression."""

import json
import re

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.constraint import Grammars
from runtimes.llm.model import load
from runtimes.llm.request import Request
from runtimes.llm.sampling import Sampling, choose
from runtimes.llm.scheduler import Scheduler
from tests.gguf_files import toy_model

jsonschema = pytest.importorskip("jsonschema", reason="pip install jsonschema")
pytest.importorskip("llguidance", reason="pip install 'edgekit[llm]'")

SCHEMAS = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "magnitude": {"type": "integer", "minimum": 0, "maximum": 30},
            "class": {"enum": ["SN Ia", "AGN", "variable star"]},
        },
        "required": ["name", "magnitude", "class"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 99}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"const": None}, {"type": "boolean"}, {"type": "string", "pattern": "^[a-f]{3}$"}]},
    {
        "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False,
                           "minItems": 2}},
        "type": "object", "properties": {"a": {"$ref": "#/$defs/pair"}, "b": {"$ref": "#/$defs/pair"}},
        "required": ["a", "b"], "additionalProperties": False,
    },
]  # fmt: skip
PATTERNS = [
    r"[a-c]{2,5}(\.x)?",
    r"(yes|no), because [a-z ]{4,20}\.",
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
    r"é[^a-z]{3}",
    r"a\\",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with load(toy_model(tmp_path_factory.mktemp("model"), "llama", "Q8_0"), engine="torch") as found:
        yield found


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("drafts", [0, 8])
def test_an_answer_is_json_of_its_schema(model, schema, drafts):
    found = set()
    for seed in range(6):
        sampling = Sampling(temperature=float(seed > 0), seed=seed)
        text = "".join(model.complete("in the", most_tokens=400, sampling=sampling, json_schema=schema, drafts=drafts))
        jsonschema.validate(json.loads(text), schema)
        found.add(text)
    assert len(found) > 1
    assert model.engine.blocks.free == model.engine.blocks.number


def test_without_a_constraint_the_same_model_writes_no_json(model):
    text = "".join(model.complete("in the", most_tokens=100, sampling=Sampling(1.0, seed=1)))
    with pytest.raises(ValueError, match="Expecting value"):
        json.loads(text)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_answer_matches_its_regular_expression(model, pattern):
    found = set()
    for seed in range(6):
        sampling = Sampling(temperature=3.0 * (seed > 0), seed=seed)
        text = "".join(model.complete("in the", most_tokens=100, sampling=sampling, regex=pattern))
        assert re.fullmatch(pattern, text)
        found.add(text)
    assert len(found) > 1 or pattern == r"a\\"


def test_drafts_change_no_token_of_a_constrained_answer(model):
    schema = {"type": "array", "items": {"enum": ["alpha", "beta"]}, "minItems": 20, "maxItems": 30}
    texts = [
        "".join(
            model.complete("in", most_tokens=400, sampling=Sampling(1.0, seed=2), json_schema=schema, drafts=drafts)
        )
        for drafts in (0, 8)
    ]
    assert texts[0] == texts[1]
    assert model._scheduler.accepted > 20


def test_a_message_obeys_its_constraint_too(model):
    text = "".join(model.chat([{"role": "user", "content": "in"}], regex="[xyz]{7}"))
    assert re.fullmatch("[xyz]{7}", text)


def test_the_best_allowed_token_is_chosen():
    logits = np.array([5.0, 1.0, 3.0, 2.0], np.float32)
    allowed = np.array([False, True, False, True])
    assert choose(logits, Sampling(), [], 0, allowed) == 3
    drawn = {choose(logits, Sampling(9.0, top_k=3, seed=1), [], number, allowed) for number in range(50)}
    assert drawn == {1, 3}
    assert choose(logits, Sampling(), [], 0) == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"regex": "("}, "'(' cannot be used: unclosed group"),
        ({"regex": "[z-a]"}, "the start must be"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "a\\"}, "ends with a backslash"),
        ({"json_schema": {"type": "strin"}}, "cannot be used: Invalid type: strin"),
        ({"json_schema": {"type": 5}}, "type must be"),
        ({"json_schema": {"$ref": "#/x"}}, "does not exist"),
        ({"json_schema": {"$ref": "https://example.com/s.json"}}, "does not fetch"),
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: ["not"]'),
        ({"json_schema": {"type": {1, 2}}}, "malformed"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {}, "regex": "a"}, "one of them"),
    ],
)
def test_a_rule_that_cannot_be_used_is_one_line(model, options, problem):
    with pytest.raises(EdgekitError, match=re.escape(problem)) as caught:
        list(model.complete("in", **options))
    assert "\n" not in str(caught.value)
    assert model.engine.blocks.free == model.engine.blocks.number


class Failing:
    """A rule that goes wrong at its third token."""

    done = False

    def __init__(self):
        self.asked = 0

    def allowed(self):
        self.asked += 1
        if self.asked == 3:
            raise EdgekitError("the rule is too complex")
        return np.ones(307, np.bool_)

    def advance(self, token):
        pass


def test_a_rule_that_fails_ends_its_own_answer_alone(model):
    scheduler = Scheduler(model.engine)
    prompt = model.tokenizer.encode("in the")
    bad = scheduler.submit(Request(prompt, 9, constraint=Failing))
    good = scheduler.submit(Request(prompt, 9))
    produced = list(scheduler)
    assert [item.finish for item in produced if item.request == bad] == [None, None, "failed"]
    assert [item.finish for item in produced if item.request == good][-1] == "length"
    assert next(item.error for item in produced if item.finish == "failed").args == ("the rule is too complex",)
    assert model.engine.blocks.free == model.engine.blocks.number


def test_a_failed_answer_raises(model, monkeypatch):
    monkeypatch.setattr(model, "_constraint", lambda *_: Failing)
    with pytest.raises(EdgekitError, match="the rule is too complex"):
        list(model.complete("in", most_tokens=9))
    assert model.engine.blocks.free == model.engine.blocks.number


def test_a_model_without_an_end_takes_no_constraint(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "ends", frozenset())
    with pytest.raises(EdgekitError, match="no token that ends"):
        Grammars(model.tokenizer)


# --- commands


def test_the_commands_take_constraints(edgekit, model, tmp_path, monkeypatch):
    path, schema = model.source.path, tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMAS[1]))
    found = edgekit("llm", "complete", str(path), "in", "--engine", "torch", "--json-schema", str(schema))
    assert found.status == 0
    jsonschema.validate(json.loads(found.out), SCHEMAS[1])
    found = edgekit("llm", "complete", str(path), "in", "--engine", "torch", "--regex", "[xyz]{5}", "--drafts", "0")
    assert re.fullmatch("[xyz]{5}", found.out.strip())


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "no JSON"), ("[1]", "the JSON is a list"), ("[" * 100_000, "no JSON"), (None, "gone.json")],
)
def test_a_file_without_a_schema_is_one_line(edgekit, model, tmp_path, content, problem):
    path = tmp_path / "gone.json"
    if content is not None:
        path.write_text(content)
    found = edgekit("llm", "complete", str(model.source.path), "in", "--engine", "torch", "--json-schema", str(path))
    assert found.status == 1
    assert problem in found.err
    assert found.err.strip().count("\n") <= 1  # the line about loading
