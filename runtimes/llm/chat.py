"""The text of a conversation, as the model's own template writes it.

A template is a program in Jinja that comes with the file, so it is a stranger's. It runs in Jinja's sandbox, which
gives it no way to Python, and in a confined process, which bounds its time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from edgekit.errors import EdgekitError, missing_extra
from edgekit.importers import sandbox

ROLES = ("system", "user", "assistant", "tool")
SECONDS = 10  # of CPU time, most of which Python takes to start
Message = Mapping[str, Any]
CALLS = ("tool_calls", "tool_call_id", "name")  # that a message may have beside role and content
Run = Callable[[str, bytes, str], bytes]  # calls package.module:function with bytes and a source, as `sandbox.run` does


def conversation(
    template: str,
    messages: Sequence[Message],
    source: str,
    *,
    guard: Callable[[str], str] = str,
    tools: Sequence[Mapping[str, Any]] = (),
    run: Run | None = None,
    **values: str,
) -> str:
    """Return the prompt for the assistant's next message. messages: each with role and content, and perhaps the calls
    of tools; guard: marks what is a content in the prompt, so that no control token in it becomes one; tools:
    descriptions of functions; run: calls the template's code, by default in a new confined process; values: texts that
    the template may use, such as bos_token."""
    for message in messages:
        good = {"role", "content"} <= set(message) <= {"role", "content", *CALLS} and message["role"] in ROLES
        if not good or not isinstance(message["content"], str):
            raise EdgekitError(f"message {dict(message)!r}; expected a role ({', '.join(ROLES)}) and a content, a text")
    contents = [{**_guarded(dict(message), guard), "role": message["role"]} for message in messages]
    given = {"template": template, "messages": contents, "tools": _guarded(list(tools), guard), "values": values}
    content = json.dumps(given).encode()
    if run is not None:
        return run("runtimes.llm.chat:render", content, source).decode(errors="replace")
    return sandbox.run("runtimes.llm.chat:render", content, source, seconds=SECONDS).decode(errors="replace")


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """Return a value of JSON with each text in it guarded; keys are texts, too."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, Mapping):
        return {guard(key): _guarded(item, guard) for key, item in value.items()}
    return [_guarded(item, guard) for item in value] if isinstance(value, list) else value


def render(given: bytes, source: str) -> bytes:
    """Run a template, in the confined process."""
    try:
        from jinja2 import meta
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise missing_extra("jinja2", "llm", "a chat template") from None

    def refuse(reason: str) -> None:
        raise EdgekitError(f"{source}: the chat template refuses these messages: {' '.join(str(reason).split())}")

    wanted = json.loads(given)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = _to_json
    values = wanted["values"] | ({"tools": wanted["tools"]} if wanted["tools"] else {})
    try:
        parsed = environment.parse(wanted["template"])
        if wanted["tools"] and "tools" not in meta.find_undeclared_variables(parsed):
            raise EdgekitError(f"{source}: the chat template has no place for tools; send the request without them")
        template = environment.from_string(parsed)
        text = template.render(messages=wanted["messages"], add_generation_prompt=True, **values).encode()
    except (EdgekitError, MemoryError):
        raise
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EdgekitError(f"{source}: the chat template failed ({reason})") from None
    return bytes(text)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Return JSON as templates of chat models expect it: with the letters as they are, where Jinja escapes them."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
