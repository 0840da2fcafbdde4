"""The end of a study: the finalists as bundles, measured beside what was predicted, and the report."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from edgekit.bundle.files import write_file
from edgekit.bundle.store import write_bundle
from edgekit.errors import EdgekitError
from edgekit.graph.lower import float_graph
from edgekit.nas import report
from edgekit.nas.clock import Progress
from edgekit.nas.compressed import compress_finalists
from edgekit.nas.latency import measure
from edgekit.nas.result import bundle, finalists, summary
from edgekit.nas.study import Study
from edgekit.session import open_session

NETWORKS, SUMMARY = "networks", "report.json"
TOLERANCE = 1e-4  # of the largest output: what torch and ONNX Runtime may differ by in float32


def finish(study: Study, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Write the finalists as bundles, measure them, and write `report.json` and `report.html` into the study's folder.
    Return what report.json holds: the study's `summary` with `measured` and, if the spec says how, `compressed`, by
    key. A finalist is verified in ONNX Runtime against torch; one that breaks a limit when it is measured is marked
    so."""
    found = list({item.key: item for item in finalists(study)}.values())
    graphs, bundles = [], {}
    for number, item in enumerate(found):
        progress("writing and verifying the finalists", number, len(found))
        made = write_bundle(bundle(study, item), study.folder / NETWORKS / f"{item.key}.edge", force=True)
        bundles[item.key] = made
        inputs, expected = made.golden()
        outputs = open_session(made, "onnxruntime", threads=1).run(inputs)
        for name, wanted in expected.items():
            gap = float(abs(outputs[name] - wanted).max())
            if not gap <= TOLERANCE * max(1.0, float(abs(wanted).max())):
                raise EdgekitError(
                    f"{item.key}: its {name} differ by {gap:.2g} between torch and ONNX Runtime; report this as a "
                    "defect, with the study's folder"
                )
        graphs.append(float_graph(made))
    progress("writing and verifying the finalists", len(found), len(found))
    limits = study.spec.limits
    times = measure(graphs, limits.batch) if graphs else []
    measured = {}
    for item, taken in zip(found, times, strict=True):
        milliseconds = 1e3 * taken.seconds
        breaks = []
        if limits.milliseconds is not None and not limits.target and milliseconds > limits.milliseconds:
            breaks.append(f"{milliseconds:.3g} ms, and {limits.milliseconds:g} are allowed")
        measured[item.key] = {"milliseconds": milliseconds, "disturbed": taken.disturbed, "breaks": breaks}
    values = {**summary(study, measured), "limits": asdict(limits), "measured": measured}
    if study.spec.compress:
        values["compressed"] = compress_finalists(study.spec, bundles, study.folder, progress)
    write_file(study.folder / SUMMARY, json.dumps(values, indent=1, allow_nan=False).encode())
    page = report.render(values)
    write_file(study.folder / report.NAME, page.encode())
    return values
