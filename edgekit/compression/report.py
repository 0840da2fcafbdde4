"""The report of a compression: one self-contained HTML file in the bundle, for screens light or dark and for paper.

Every number in it is in the manifest too (`edgekit inspect --json`); the report only shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from edgekit import machine
from edgekit.bundle.format import Bundle, with_files
from edgekit.bundle.pack import pack
from edgekit.compression.guard import Latency
from edgekit.errors import missing_extra

try:  # at import, so that a missing package is told before the work and not after it
    import jinja2
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from edgekit.compression import plots
except ImportError as error:
    raise missing_extra(error.name or "matplotlib", "compress", "the report") from None

NAME = "report.html"
Record = Mapping[str, Any]


def with_report(bundle: Bundle, source: Bundle) -> Bundle:
    """The bundle with `report.html` added: what its passes made of `source`."""
    return with_files(bundle, {NAME: render(bundle, source).encode()})


def render(bundle: Bundle, source: Bundle) -> str:
    """The report as HTML text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "interval": _interval, "setting": _setting}
    template = environment.from_string(files("edgekit.compression").joinpath(NAME).read_text(encoding="utf-8"))
    values = summary(bundle, source)
    return template.render(**values, pictures=_pictures(values)) + "\n"


def summary(bundle: Bundle, source: Bundle) -> dict[str, Any]:
    """What the report says, as plain values.

    `before` and `after` are states {quality, bytes, parameters} of the source and of the result, None where no pass
    was measured. `latency` compares the two, `latency_measured` tells whether directly or as a product over passes.
    """
    manifest = bundle.manifest
    inherited, own = _split(bundle, source)
    compression = manifest.metrics.get("compression", {})
    kept = [record for record in own if record["kept"]]
    before = own[0]["before"] if own else None
    measured = [Latency(**item) for item in compression.get("latency", [])]
    latency = measured or chained([[Latency(**item) for item in record["latency"]] for record in kept])
    sizes = [before["bytes"], (kept[-1]["after"] if kept else before)["bytes"]] if before else _packed(source, bundle)
    return {
        "name": source.manifest.name,
        "manifest": manifest,
        "digest": source.digest,
        "own": own,
        "inherited": inherited,
        "kept": kept,
        "before": before,
        "after": kept[-1]["after"] if kept else before,
        "change": kept[-1]["loss"] if kept else None,
        "sizes": sizes,
        "latency": latency,
        "latency_measured": bool(measured),
        "metric": compression.get("metric", "quality metric"),
        "limits": compression.get("limits", {}),
        "search": manifest.metrics.get("search"),
        "front": front(manifest.metrics.get("search")),
        "runtime": compression.get("runtime"),
        "estimated_on": compression.get("estimated_on"),
        "machine": compression.get("machine") or machine.describe(),
    }


def front(search: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The trials on the Pareto front of a search, smallest loss first, each with its passes in words."""
    found = [dict(trial) for trial in search["trials"] if trial["on_front"]] if search else []
    for trial in found:
        trial["passes"] = ", ".join(step["name"] for step in trial["recipe"]) or "as it is"
    return sorted(found, key=lambda trial: math.inf if trial["loss"] is None else trial["loss"])


def chained(passes: Sequence[Sequence[Latency]]) -> list[Latency]:
    """Latency of the last against the first of several passes, each measured against the one before it: the product of
    the ratios, their intervals joined as independent errors of the logarithms."""
    if not passes:
        return []
    result = []
    for first in passes[0]:
        same = [item for one in passes for item in one if item.batch == first.batch]
        ratio = math.prod(item.ratio for item in same)
        down, up = (
            math.sqrt(sum(math.log(getattr(item, side) / item.ratio) ** 2 for item in same)) for side in ("low", "high")
        )
        result.append(
            Latency(
                first.batch,
                first.before_ms,
                first.before_ms * ratio,
                ratio,
                ratio * math.exp(-down),
                ratio * math.exp(up),
            )
        )
    return result


def _split(bundle: Bundle, source: Bundle) -> tuple[list[Record], list[Record]]:
    """Records that the source came with, and those of this compression."""
    records: list[Record] = list(bundle.manifest.records)
    old: list[Record] = list(source.manifest.records)
    count = len(old) if records[: len(old)] == old else 0
    return records[:count], records[count:]


def _packed(*bundles: Bundle) -> list[int]:
    return [len(pack(bundle)) for bundle in bundles]


def _pictures(values: Mapping[str, Any]) -> dict[str, Markup]:
    """Inline SVG by name; a picture without data is left out."""
    found = {}
    before = values["before"]
    measured = [
        (number, record)
        for number, record in enumerate(values["own"], start=1)
        if "after" in record and None not in (*record["after"]["quality"].values(), *record["loss"].values())
    ]
    if measured:
        quality = before["quality"]["value"]
        start = plots.Point(0, "original", before["bytes"], quality, quality, quality, kept=True)
        steps = [
            plots.Point(
                number,
                record["pass"],
                record["after"]["bytes"],
                record["after"]["quality"]["value"],
                quality + record["loss"]["low"],
                quality + record["loss"]["high"],
                record["kept"],
            )
            for number, record in measured
        ]
        figure = plots.trajectory(start, steps, values["limits"].get("max_loss"), values["metric"])
        found["trajectory"] = _inline(figure, "Quality against packed size, pass by pass")
        found["bytes"] = _inline(plots.bytes_per_pass(start, steps), "Packed bytes after each pass")
    if search := values["search"]:
        limit = search["targets"]["max_loss"]
        found["pareto"] = _inline(
            plots.pareto(search["trials"], search["chosen"], limit, values["metric"]), "Trials of the search"
        )
        if search["sensitivity"]:
            found["sensitivity"] = _inline(
                plots.sensitivity_bars(search["sensitivity"], values["metric"]), "Sensitivity of each weight"
            )
    if values["latency"]:
        where = (
            f"Time per call, estimate for {values['estimated_on']}" if values["estimated_on"] else "CPU time per call"
        )
        found["latency"] = _inline(plots.latency_bars(values["latency"]), f"{where}, before and after")
    return found


def _inline(figure: Figure, title: str) -> Markup:
    return Markup(plots.to_svg(figure, title, inline=True))  # made here from numbers; matplotlib escapes the labels


def _number(value: float | None, form: str = ".4f") -> str:
    """Whole numbers with thousands separated; a manifest writes null where a measurement was NaN."""
    if value is None:
        return "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:{form}}"


def _interval(item: Mapping[str, float | None] | Latency, form: str = ".4f") -> str:
    low, high = (item.low, item.high) if isinstance(item, Latency) else (item["low"], item["high"])
    return "" if low is None or high is None else f"[{low:{form}}, {high:{form}}]"


def _setting(value: object) -> str:
    """A parameter as TOML writes it, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_setting(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_setting, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
