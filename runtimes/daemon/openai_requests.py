"""The requests of OpenAI's API, read field by field. A field that this daemon does not support is refused by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtimes.daemon.fields import Fields, plain
from runtimes.daemon.refusal import RefusedError
from runtimes.llm.chat import CALLS, ROLES
from runtimes.llm.lookup import MOST_DRAFTS
from runtimes.llm.sampling import Sampling

MOST_STOPS, LONGEST_STOP = 16, 256
MOST_MESSAGES, MOST_TOOLS = 4096, 128
MOST_LOGPROBS = 20
PRIORITIES = ("interactive", "batch")
COMMON = (
    *("model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "seed", "stop", "n", "logprobs", "priority", "deadline_ms", "drafts", "user"),
)
CHAT = (*COMMON, "messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice")
COMPLETION = (*COMMON, "prompt", "response_format")
# values of fields that change nothing; any other value is refused
NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "parallel_tool_calls": True,
    "store": False,
    "metadata": {},
    "modalities": ["text"],
    "service_tier": "auto",
    "audio": None,
    "functions": None,
    "function_call": None,
    "prediction": None,
    "reasoning_effort": None,
    "verbosity": None,
    "web_search_options": None,
}
NEUTRAL_COMPLETION: Mapping[str, Any] = {
    name: NEUTRAL[name] for name in ("frequency_penalty", "presence_penalty", "logit_bias")
} | {"best_of": 1, "echo": False, "suffix": None}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What every request for an answer says. most_tokens: None for as many as the cache has room for; logprobs: of how
    many tokens beside the chosen one, None for none at all; schema: of JSON; deadline: seconds from now."""

    model: str
    stream: bool
    usage: bool
    most_tokens: int | None
    sampling: Sampling
    stop: Sequence[str]
    answers: int
    logprobs: int | None
    schema: Mapping[str, Any] | None
    interactive: bool
    deadline: float | None
    drafts: int


@dataclass(frozen=True, slots=True)
class ChatRequest:
    wanted: Wanted
    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """prompts: texts, or token ids."""

    wanted: Wanted
    prompts: Sequence[str | Sequence[int]]


def chat_request(body: Mapping[str, Any], most_answers: int) -> ChatRequest:
    fields = Fields(body)
    messages = fields.take("messages", list, needed=True)
    if not 1 <= len(messages) <= MOST_MESSAGES:
        raise RefusedError(400, f"messages has {len(messages)}; expected 1 to {MOST_MESSAGES}", parameter="messages")
    found = [_message(item, f"messages[{number}]") for number, item in enumerate(messages)]
    tools = _tools(fields)
    logprobs = None
    if fields.take("logprobs", bool, False):
        logprobs = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    elif fields.take("top_logprobs", int, 0):
        raise RefusedError(400, "top_logprobs needs logprobs = true", parameter="top_logprobs")
    wanted = _wanted(fields, most_answers, logprobs, most_name="max_completion_tokens")
    fields.finish(CHAT, NEUTRAL)
    return ChatRequest(wanted, found, tools)


def completion_request(body: Mapping[str, Any], most_answers: int) -> CompletionRequest:
    fields = Fields(body)
    prompts = fields.prompts("prompt", most_answers)
    logprobs = fields.take("logprobs", int) if "logprobs" in fields else None
    if logprobs is not None and not 0 <= logprobs <= MOST_LOGPROBS:
        raise fields.refused("logprobs", logprobs, f"0 to {MOST_LOGPROBS}")
    wanted = _wanted(fields, most_answers, logprobs)
    if len(prompts) * wanted.answers > most_answers:
        raise RefusedError(
            400, f"{len(prompts)} prompts with n = {wanted.answers}; expected up to {most_answers} answers in all"
        )
    fields.finish(COMPLETION, NEUTRAL_COMPLETION)
    return CompletionRequest(wanted, prompts)


def _wanted(fields: Fields, most_answers: int, logprobs: int | None, most_name: str = "max_tokens") -> Wanted:
    most = fields.whole("max_tokens", 0, 1, 1 << 30) if "max_tokens" in fields else None
    if most_name in fields:
        if most is not None:
            raise RefusedError(400, f"max_tokens and {most_name} are given; send one of them", parameter=most_name)
        most = fields.whole(most_name, 0, 1, 1 << 30)
    temperature = fields.number("temperature", 1.0, 0.0, 2.0)
    answers = fields.whole("n", 1, 1, most_answers)
    if answers > 1 and temperature == 0:
        raise RefusedError(
            400, f"n = {answers} with temperature = 0 would give one answer {answers} times", parameter="n"
        )
    seed = fields.whole("seed", int.from_bytes(os.urandom(6), "little"), -(1 << 63), (1 << 63) - 1)
    sampling = Sampling(
        temperature,
        fields.whole("top_k", 0, 0, 1 << 30),
        max(fields.number("top_p", 1.0, 0.0, 1.0), 1e-9),
        fields.number("min_p", 0.0, 0.0, 0.999),
        fields.number("repetition_penalty", 1.0, 0.01, 100.0),
        seed % (1 << 64),
    )
    stream = fields.take("stream", bool, False)
    deadline = fields.number("deadline_ms", 0, 1, 1e9) / 1e3 if "deadline_ms" in fields else None
    fields.take("user", str)  # a label of the client's own, which changes no answer in OpenAI's service either
    return Wanted(
        model=fields.take("model", str, needed=True),
        stream=stream,
        usage=_wants_usage(fields, stream),
        most_tokens=most,
        sampling=sampling,
        stop=fields.texts("stop", MOST_STOPS, LONGEST_STOP),
        answers=answers,
        logprobs=logprobs,
        schema=_schema(fields),
        interactive=fields.choice("priority", "interactive", PRIORITIES) == "interactive",
        deadline=deadline,
        drafts=fields.whole("drafts", MOST_DRAFTS, 0, MOST_DRAFTS),
    )


def _wants_usage(fields: Fields, stream: bool) -> bool:
    given = fields.take("stream_options", dict)
    if given is None:
        return not stream
    if not stream:
        raise RefusedError(400, "stream_options needs stream = true", parameter="stream_options")
    options = Fields(given, "stream_options.")
    found = bool(options.take("include_usage", bool, False))
    options.finish(("include_usage",), {"include_obfuscation": False})
    return found


def _schema(fields: Fields) -> Mapping[str, Any] | None:
    given = fields.take("response_format", dict)
    if given is None:
        return None
    form = Fields(given, "response_format.")
    category = form.choice("type", "", ("text", "json_object", "json_schema"))
    found: Mapping[str, Any] | None = None
    if category == "json_object":
        found = {"type": "object"}
    if category == "json_schema":
        inner = Fields(form.take("json_schema", dict, needed=True), "response_format.json_schema.")
        inner.take("name", str)
        inner.take("description", str)
        inner.take("strict", bool)  # an answer always obeys the schema
        found = plain(inner.take("schema", dict, needed=True), "response_format.json_schema.schema")
        inner.finish(("name", "description", "strict", "schema"))
    form.finish(("type", "json_schema"))
    return found


def _tools(fields: Fields) -> Sequence[Mapping[str, Any]]:
    tools = fields.take("tools", list, [])
    if len(tools) > MOST_TOOLS:
        raise RefusedError(400, f"tools has {len(tools)}; expected up to {MOST_TOOLS}", parameter="tools")
    for number, item in enumerate(tools):
        if not isinstance(item, dict) or item.get("type") != "function" or not isinstance(item.get("function"), dict):
            raise RefusedError(
                400, f'tools[{number}]; expected {{"type": "function", "function": {{...}}}}', parameter="tools"
            )
    choice = fields.take("tool_choice", (str, dict), "auto")
    if choice not in ("auto", "none"):
        raise fields.refused("tool_choice", choice, "auto or none; the model's own template decides how it calls")
    return [] if choice == "none" else plain(tools, "tools")


def _message(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RefusedError(400, f"{where} is no object; expected a role and a content", parameter=where)
    fields = Fields(value, f"{where}.")
    role = fields.choice("role", "", (*ROLES, "developer"))
    found: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = plain(fields.take("tool_calls", list), f"{where}.tool_calls")
    found["content"] = _content(fields.take("content", (str, list), needed=calls is None), f"{where}.content")
    found |= {} if calls is None else {"tool_calls": calls}
    for name in ("tool_call_id", "name"):
        if (text := fields.take(name, str)) is not None:
            found[name] = text
    fields.finish(("role", "content", *CALLS), {"refusal": None, "annotations": [], "audio": None})
    return found


def _content(value: str | list[Any] | None, where: str) -> str:
    """Return a text, or the texts of parts."""
    if value is None or isinstance(value, str):
        return value or ""
    texts = []
    for number, item in enumerate(value):
        part = Fields(item if isinstance(item, dict) else {}, f"{where}[{number}].")
        category = part.take("type", str, needed=True)
        if category != "text":
            raise RefusedError(
                400, f"{where}[{number}].type = {category[:40]!r}; this model takes texts alone", parameter=where
            )
        texts.append(part.take("text", str, needed=True))
        part.finish(("type", "text"))
    return "".join(texts)
