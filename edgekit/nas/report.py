"""The report of a study: one self-contained HTML file, for screens light or dark."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from edgekit.errors import missing_extra

try:
    import jinja2
    from markupsafe import Markup
    from matplotlib.figure import Figure

    from edgekit.compression.plots import BEFORE, KEPT, LOST, MUTED, styled, to_svg
except ImportError as error:
    raise missing_extra(error.name or "matplotlib", "compress", "the report") from None

NAME = "report.html"
UNITS = {"macs": (1e6, "million multiply-accumulates"), "parameters": (1e3, "thousand parameters"),
         "activations": (1e6, "MB of activations"), "milliseconds": (1.0, "predicted milliseconds")}  # fmt: skip


def render(values: Mapping[str, Any]) -> str:
    """Return the report of a study's `summary`, with what `finish` adds to it."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": lambda value: f"{value:.3g}", "count": lambda value: f"{value:,.0f}"}
    template = environment.from_string(files("edgekit.nas").joinpath(NAME).read_text(encoding="utf-8"))
    picture = Markup(to_svg(front_figure(values), "Score against cost", inline=True))
    return template.render(**{"measured": {}, "compressed": {}, **values}, picture=picture) + "\n"


@styled
def front_figure(values: Mapping[str, Any]) -> Figure:
    """Plot the score of each network against its cost; a line connects those that no other one dominates."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    scale, unit = UNITS[values["cost"]]
    for arm, points in values["points"].items():
        control = arm == "random" and len(values["points"]) > 1
        colour = LOST if control else KEPT
        axes.plot(
            [cost / scale for _, cost, _ in points], [score for *_, score in points], "o", markersize=4, alpha=0.45,
            color=colour,
        )  # fmt: skip
        front = values["front"][arm]
        axes.plot(
            [cost / scale for _, cost, _ in front], [score for *_, score in front], "--" if control else "-",
            color=colour, linewidth=1.4, label=f"front of {arm}",
        )  # fmt: skip
    if values["cost"] == "milliseconds" and not values.get("limits", {}).get("target"):
        scores = {key: (cost, score) for points in values["points"].values() for key, cost, score in points}
        for key, taken in values.get("measured", {}).items():
            predicted, score = scores[key]
            axes.plot([predicted, taken["milliseconds"]], [score, score], "-", color=MUTED, linewidth=1)
            axes.plot(taken["milliseconds"], score, "D", markersize=5, color=MUTED)
        if values.get("measured"):
            axes.plot([], [], "D-", markersize=5, color=MUTED, label="predicted to measured")
    axes.set_xlabel(unit)
    axes.set_ylabel("score of the first rung" if values["trained"] else "proxy")
    axes.legend(labelcolor=MUTED, edgecolor=BEFORE)
    return figure
