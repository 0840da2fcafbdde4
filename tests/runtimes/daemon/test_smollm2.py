"""The daemon with a real model: SmolLM2 135M Instruct on the native engine."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtimes.daemon.config import ModelSettings
from runtimes.llm.model import load
from tests.runtimes.llm.conftest import compiler

pytestmark = [pytest.mark.models, compiler]
QUESTIONS = ["Which planet is the largest?", "What is the capital of France?", "Name a color.", "What do bees make?"]


@pytest.fixture(scope="module")
def running(start, smollm2_file):
    with start(models={"smollm2": ModelSettings(path=str(smollm2_file), context=4096)}) as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    openai = pytest.importorskip("openai", reason="pip install openai")
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def ask(client, question, **options):
    message = [{"role": "user", "content": question}]
    options = {"temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(model="smollm2", messages=message, **options).choices[0].message.content


def test_concurrent_chats_get_the_tokens_of_a_model_of_their_own(client, smollm2_file):
    """The native engine computes the same bits in every batch, so the schedule cannot change an answer."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda question: ask(client, question), QUESTIONS * 2))
    with load(smollm2_file, context=1024) as model:
        expected = ["".join(model.chat([{"role": "user", "content": item}], most_tokens=24)) for item in QUESTIONS]
    assert found == expected * 2
    assert "Jupiter" in found[0]


def test_an_answer_obeys_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "moons": {"type": "integer", "maximum": 200}},
        "required": ["name", "moons"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "planet", "schema": schema}}
    found = json.loads(ask(client, "Describe Jupiter as JSON.", response_format=form, max_tokens=80))
    assert set(found) == {"name", "moons"}


def test_nothing_is_held_afterwards(running):
    assert running.settled("smollm2")
