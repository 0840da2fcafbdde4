"""The text of a conversation, as the model's own template writes it.

A template is a program in Jinja that comes with the file, so it is a stranger's. It runs in Jinja's sandbox, which
gives it no way to Python, and in a confined process, which bounds its time and memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence

from edgekit.errors import EdgekitError, missing_extra
from edgekit.importers import sandbox

ROLES = ("system", "user", "assistant", "tool")
SECONDS = 10  # of CPU time, most of which Python takes to start
Message = Mapping[str, str]


def conversation(
    template: str,
    messages: Sequence[Message],
    source: str,
    *,
    guard: Callable[[str], str] = str,
    **values: str,
) -> str:
    """Return the prompt for the assistant's next message. messages: each with role and content; guard: marks what is a
    content in the prompt, so that no control token in it becomes one; values: texts that the template may use, such as
    bos_token."""
    for message in messages:
        good = set(message) == {"role", "content"} and message["role"] in ROLES
        if not good or not isinstance(message["content"], str):
            raise EdgekitError(f"message {dict(message)!r}; expected a role ({', '.join(ROLES)}) and a content, a text")
    contents = [{"role": message["role"], "content": guard(message["content"])} for message in messages]
    given = json.dumps({"template": template, "messages": contents, "values": values})
    return sandbox.run("runtimes.llm.chat:render", given.encode(), source, seconds=SECONDS).decode(errors="replace")


def render(given: bytes, source: str) -> bytes:
    """Run a template, in the confined process."""
    try:
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
    try:
        template = environment.from_string(wanted["template"])
        text = template.render(messages=wanted["messages"], add_generation_prompt=True, **wanted["values"]).encode()
    except (EdgekitError, MemoryError):
        raise
    except Exception as error:  # a template is a program, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise EdgekitError(f"{source}: the chat template failed ({reason})") from None
    return bytes(text)
