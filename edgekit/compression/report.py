"""The report of a compression: one self-contained HTML file in the bundle, for screens light or dark and for paper.

Every number in it is in the manifest too (`edgekit inspect --json`); the report only shows them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from edgekit import machine
from edgekit.bundle.format import Bundle, with_files
from edgekit.bundle.pack import pack
from edgekit.compression.guard import Latency, State
from edgekit.compression.metrics import Measurement
from edgekit.compression.record import PassRecord, records_of, search_of, summary_of
from edgekit.errors import missing_extra

try:  # at import, so that the error for a missing package comes before the work
    import jinja2
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from edgekit.compression import plots
except ImportError as error:
    raise missing_extra(error.name or "matplotlib", "compress", "the report") from None

NAME = "report.html"


def with_report(bundle: Bundle, source: Bundle) -> Bundle:
    """Return the bundle with `report.html`, which compares it with `source`."""
    return with_files(bundle, {NAME: render(bundle, source).encode()})


def render(bundle: Bundle, source: Bundle) -> str:
    """Return the report as HTML text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "interval": _interval, "setting": _setting}
    template = environment.from_string(files("edgekit.compression").joinpath(NAME).read_text(encoding="utf-8"))
    values = summary(bundle, source)
    return template.render(**values, pictures=_pictures(values)) + "\n"


def summary(bundle: Bundle, source: Bundle) -> dict[str, Any]:
    """Return the values that the template shows.

    `before` and `after` are the states of the source and of the result, None if no pass ran. `latency` compares the
    two; `latency_measured` tells whether it was measured directly or is a product over the passes.
    """
    inherited, own = _split(bundle, source)
    summarized, search = summary_of(bundle), search_of(bundle)
    kept = [record for record in own if record.kept]
    before = own[0].before if own else None
    after: State | None = kept[-1].after if kept else before
    latency = summarized.latency if summarized else chained([record.latency for record in kept])
    sizes = [before.bytes, after.bytes] if before and after else [len(pack(item)) for item in (source, bundle)]
    return {
        "name": source.manifest.name,
        "manifest": bundle.manifest,
        "digest": source.digest,
        "own": own,
        "inherited": inherited,
        "kept": kept,
        "before": before,
        "after": after,
        "change": kept[-1].loss if kept else None,
        "sizes": sizes,
        "latency": latency,
        "latency_measured": summarized is not None,
        "metric": summarized.metric if summarized else "quality metric",
        "limits": asdict(summarized.limits) if summarized else {},
        "search": search,
        "front": search.front if search else [],
        "runtime": summarized.runtime if summarized else None,
        "estimated_on": summarized.estimated_on if summarized else None,
        "machine": summarized.machine if summarized else machine.describe(),
    }


def chained(passes: Sequence[Sequence[Latency]]) -> list[Latency]:
    """Return the latency of the last of several passes against the first, each measured against the one before it: the
    product of the ratios, their intervals joined as independent errors of the logarithms."""
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


def _split(bundle: Bundle, source: Bundle) -> tuple[tuple[PassRecord, ...], tuple[PassRecord, ...]]:
    """Return the records that the source already had, and those of this compression."""
    old = source.manifest.records
    count = len(old) if bundle.manifest.records[: len(old)] == old else 0
    records = records_of(bundle)
    return records[:count], records[count:]


def _pictures(values: Mapping[str, Any]) -> dict[str, Markup]:
    """Return inline SVG by name, without the pictures that have no data."""
    found = {}
    metric, search = values["metric"], values["search"]
    if points := _points(values["own"]):
        figure = plots.trajectory(points[0], points[1:], values["limits"].get("max_loss"), metric)
        found["trajectory"] = _inline(figure, "Quality against packed size, pass by pass")
        found["bytes"] = _inline(plots.bytes_per_pass(points[0], points[1:]), "Packed bytes after each pass")
    if search:
        figure = plots.pareto(search.trials, search.chosen, search.constraints.max_loss, metric)
        found["pareto"] = _inline(figure, "Trials of the search")
        if search.sensitivity:
            figure = plots.sensitivity_bars(search.sensitivity, metric)
            found["sensitivity"] = _inline(figure, "Sensitivity of each weight")
    if values["latency"]:
        estimated = values["estimated_on"]
        where = f"Time per call, estimate for {estimated}" if estimated else "CPU time per call"
        found["latency"] = _inline(plots.latency_bars(values["latency"]), f"{where}, before and after")
    return found


def _points(records: Sequence[PassRecord]) -> list[plots.Point]:
    """Return the original and each measured pass as points of quality and size; none if no pass was measured."""
    found = []
    for number, record in enumerate(records, start=1):
        after, loss = record.after, record.loss
        if after is None or loss is None or not all(_finite(item) for item in (after.quality, loss)):
            continue
        quality = records[0].before.quality.value
        low, high = quality + loss.low, quality + loss.high
        found.append(plots.Point(number, record.name, after.bytes, after.quality.value, low, high, record.kept))
    if not found:
        return []
    first = records[0].before
    quality = first.quality.value
    return [plots.Point(0, "original", first.bytes, quality, quality, quality, kept=True), *found]


def _finite(item: Measurement) -> bool:
    return all(map(math.isfinite, (item.value, item.low, item.high)))


def _inline(figure: Figure, title: str) -> Markup:
    return Markup(plots.to_svg(figure, title, inline=True))  # made here from numbers; matplotlib escapes the labels


def _number(value: float, form: str = ".4f") -> str:
    """Format a number; whole numbers get separators of thousands."""
    if not math.isfinite(value):
        return "not a number"
    return f"{value:,}" if isinstance(value, int) else f"{value:{form}}"


def _interval(item: Measurement | Latency, form: str = ".4f") -> str:
    return f"[{item.low:{form}}, {item.high:{form}}]" if math.isfinite(item.low) and math.isfinite(item.high) else ""


def _setting(value: object) -> str:
    """Return a parameter as TOML writes it, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_setting(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_setting, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
