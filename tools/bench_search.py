"""Compare predicted and measured times of architectures that the correction has not seen, and predictors of them.

    python tools/bench_search.py --json bench_search.json

For each packaged space, networks are drawn that keep the limits, eight correct this machine's operator table, and the
others are predicted, exported and measured in turns, on one thread by CPU time. `share` is the part of wall time that
the calls had: if other programs ran, it is below 1, and the times are too long.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edgekit import machine
from edgekit.cost.measured import OperatorTable, table
from edgekit.errors import EdgekitError
from edgekit.nas.latency import ANCHORS, GROUPS, Correction, corrected, exported, measure, parts_of
from edgekit.nas.outline import outline
from edgekit.nas.ranks import spearman
from edgekit.nas.space import NAMES, key_of, open_space
from edgekit.nas.strategies import draw
from edgekit.nn.hiera_config import HieraConfig

MOST_MACS = 2.2e9


def networks(space: str, count: int) -> list[HieraConfig]:
    """Return different networks of a packaged space."""
    opened, rng = open_space({"name": space}), draw("bench", space)
    found: dict[str, HieraConfig] = {}
    while len(found) < count:
        try:
            config = opened.config(opened.sample(rng))
        except EdgekitError:
            continue
        if outline(config).macs <= MOST_MACS:
            found[key_of(config)] = config
    return list(found.values())


def compare(space: str, count: int, known: OperatorTable, batch: int, rounds: float) -> dict[str, Any]:
    """Measure anchors and others, and judge the predictors on the others."""
    configs = networks(space, ANCHORS + count)
    graphs = [exported(config) for config in configs]
    taken = measure(graphs, batch, seconds=rounds)
    outlines = [outline(config, batch) for config in configs]
    parts = [parts_of(item.work, known) for item in outlines]
    seconds = [item.seconds for item in taken]
    correction = corrected(parts[:ANCHORS], seconds[:ANCHORS])
    unseen = seconds[ANCHORS:]
    predictors: dict[str, list[float]] = {
        "table, corrected": [correction.seconds(row) for row in parts[ANCHORS:]],
        "table": [Correction().seconds(row) for row in parts[ANCHORS:]],
        "macs": [float(item.macs) for item in outlines[ANCHORS:]],
        "parameters": [float(item.parameters) for item in outlines[ANCHORS:]],
    }
    rows = {}
    for name, values in predictors.items():
        row = {"spearman": round(spearman(values, unseen), 4)}
        scaled = values
        if name in ("macs", "parameters"):  # one factor, from the same anchors
            whole = [float(getattr(item, name)) for item in outlines]
            factor = statistics.median(a / b for a, b in zip(seconds[:ANCHORS], whole[:ANCHORS], strict=True))
            scaled = [factor * value for value in values]
        errors = [abs(a / b - 1) for a, b in zip(scaled, unseen, strict=True)]
        row |= {"median_error": round(statistics.median(errors), 4), "p90": round(float(np.percentile(errors, 90)), 4)}
        rows[name] = row
        print(f"{space} batch {batch} {name:18} {row}", flush=True)
    return {
        "space": space, "batch": batch, "networks": count, "anchors": ANCHORS,
        "milliseconds": [round(1e3 * min(unseen), 3), round(1e3 * max(unseen), 3)],
        "share": round(min(item.share for item in taken), 3),
        "factors": dict(zip(GROUPS, (round(value, 3) for value in correction.factors), strict=True)),
        "stated_error": round(correction.error, 4), "predictors": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--networks", type=int, default=40, help="that are predicted, in each space")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls for each network")
    options = parser.parse_args()
    known = table()
    results = [compare(space, options.networks, known, batch, options.seconds) for space in NAMES for batch in (1, 16)]
    if options.json:
        content = {
            "machine": machine.describe(), "onnxruntime": onnxruntime.__version__, "spaces": results,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
