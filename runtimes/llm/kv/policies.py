"""The policies by name, and their options as text: "h2o", or "h2o:budget=256,every=16"."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from edgekit.errors import EdgekitError, unknown
from runtimes.llm.kv.cache import Policy
from runtimes.llm.kv.d2o import D2O
from runtimes.llm.kv.full import Full
from runtimes.llm.kv.gear import Gear
from runtimes.llm.kv.h2o import H2O
from runtimes.llm.kv.hadamard import Hadamard
from runtimes.llm.kv.kivi import Kivi
from runtimes.llm.kv.per_token import PerToken
from runtimes.llm.kv.shadowkv import ShadowKV
from runtimes.llm.kv.snapkv import SnapKV
from runtimes.llm.kv.streaming import Streaming
from runtimes.llm.kv.window import Window

EXACT = "full"  # the default cache of the torch engine: paged, in the engine's own dtype
POLICIES: dict[str, Policy] = {
    "f16": Full(),
    "int8": PerToken(8),
    "int4": Kivi(4),
    "int5": Kivi(5),
    "hadamard": Hadamard(4),
    "gear": Gear(),
    "h2o": H2O(),
    "streaming": Streaming(),
    "snapkv": SnapKV(),
    "d2o": D2O(),
    "shadowkv": ShadowKV(),
    "window": Window(),
}


def policy(text: str) -> Policy | None:
    """Return the policy of a text; None for the default cache."""
    name, _, rest = text.partition(":")
    if name == EXACT and not rest:
        return None
    if name not in POLICIES:
        raise unknown("key-value cache of the torch engine", name, (EXACT, *POLICIES))
    found, given = POLICIES[name], {}
    defaults = {field.name: getattr(found, field.name) for field in fields(found)}  # type: ignore[arg-type]
    for part in filter(None, rest.split(",")):
        option, _, value = part.partition("=")
        if option not in defaults:
            raise unknown(f"option of the kv policy {name}", option, defaults or ["no options"])
        given[option] = _parsed(name, option, value, type(defaults[option]))
    changed: Policy = replace(found, **given)  # type: ignore[type-var]
    return changed


def _parsed(name: str, option: str, value: str, wanted: type[Any]) -> Any:
    try:
        return wanted(value)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}[wanted]
        raise EdgekitError(f"kv policy {name}: {option} = {value!r}; expected {kind}") from None
