"""A network of a study in words, and where its parameters, operations and time are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.errors import EdgekitError
from edgekit.nas.outline import outline
from edgekit.nas.strategies import effects
from edgekit.nas.study import Study
from edgekit.nn.hiera_config import ATTENTIONS, HieraConfig, arguments

FEWEST = 4  # digits of a key that name a network


def explained(study: Study, key: str) -> dict[str, Any]:
    """Return a network that the study tried, as JSON: its text, its arguments, its cost by kind of operator, and for
    each factor the mean score of the networks with its value and with the best one that was tried."""
    keys = {item["key"]: item for item in study.journal.events if item["event"] == "trial"}
    matching = [name for name in keys if name.startswith(key)] if len(key) >= FEWEST else []
    if len(matching) != 1:
        raise EdgekitError(
            f"{len(matching)} networks of the study begin with {key!r}; expected the first {FEWEST} or more digits of "
            f"one key, such as {next(iter(keys), 'of a trial')}"
        )
    event = keys[matching[0]]
    config = HieraConfig(**event["arguments"])
    found = outline(config, study.spec.limits.batch)
    rows: dict[str, dict[str, Any]] = {}
    for operator in found.work.operators:
        if operator.view:
            continue
        row = rows.setdefault(operator.op_type, {"part": operator.op_type, "parameters": 0, "macs": 0})
        row["parameters"] += int(sum(operator.weights.values())) // 4
        row["macs"] += round(operator.operations / 2) if operator.product else 0
    for name, seconds in (study.clock.parts(found) if study.clock else {}).items():
        rows[name]["milliseconds"] = 1e3 * seconds
    ordered = sorted(rows.values(), key=lambda row: (-row["macs"], row["part"]))
    return {
        "key": event["key"], "text": described(config), "arguments": arguments(config), "score": event["score"],
        "proxies": event["proxies"], "parts": ordered, "choices": _choices(study, event),
    }  # fmt: skip


def _choices(study: Study, event: Mapping[str, Any]) -> list[dict[str, Any]]:
    factors = study.spec.space.factors
    values = {
        name: str(options[index]) for (name, options), index in zip(factors.items(), event["choice"], strict=True)
    }
    rows = []
    for factor, means in effects(study.spec.space, study.tried(event["arm"])):
        best = max(means, key=lambda value: means[value])
        rows.append(
            {
                "factor": factor, "value": values[factor], "mean": means[values[factor]], "best": best,
                "best_mean": means[best],
            }
        )  # fmt: skip
    return rows


def described(config: HieraConfig) -> str:
    """Return the network in a sentence."""
    parts = [f"stem {config.stem} to {config.width} channels"]
    for stage, (depth, kind) in enumerate(zip(config.depths, config.kinds, strict=True)):
        side = config.sides[stage]
        text = f"{depth} {kind} of width {config.widths[stage]} at {side}x{side}"
        if kind in ATTENTIONS:
            text += f", {config.widths[stage] // config.head_dim} heads"
        parts.append(text)
    return "; ".join(parts)
