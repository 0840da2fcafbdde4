"""edgekit inspect"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.console import output, print_json, print_table

if TYPE_CHECKING:
    from edgekit.bundle.encoding import Encoding
    from edgekit.bundle.format import Bundle
    from edgekit.compression.guard import State
    from edgekit.compression.record import PassRecord, Summary

EXAMPLE = """\b
Examples:
  edgekit inspect t2-gr
  edgekit inspect t2.edge --weights
  edgekit inspect t2.edgepack --json
"""


@click.command(epilog=EXAMPLE)
@click.argument("bundle")
@click.option("--lineage", is_flag=True, help="List what it was made from: each bundle, its passes and their seeds.")
@click.option("--weights", is_flag=True, help="List every tensor: shape, encoding, zeros, bytes.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(bundle: str, lineage: bool, weights: bool, as_json: bool) -> None:
    """Show what BUNDLE (a directory, a packed file or a model's name) holds and how it was made."""
    from edgekit.importers.api import open_model

    opened = open_model(bundle)
    if lineage:
        _show_lineage(ancestry(opened), as_json)
        return
    found = describe(opened)
    tensors = tensor_rows(opened) if weights else None
    if as_json:
        print_json(found | ({"weights": tensors} if tensors is not None else {}))
        return
    _show(opened, found)
    if tensors is not None:
        output.print("\nweights", style="bold")
        rows = [
            [
                item["name"],
                " x ".join(map(str, item["shape"])),
                item["encoding"],
                f"{item['zeros']:.0%}",
                f"{item['bytes']:,}",
            ]
            for item in tensors
        ]
        print_table(["tensor", "shape", "encoding", "zeros", "bytes"], rows)
        total = sum(item["bytes"] for item in tensors)
        output.print(f"{len(tensors)} tensors, {total:,} bytes at code width, before entropy coding")


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything that the manifest says, and the sizes; plain values."""
    from dataclasses import asdict

    from edgekit.bundle.format import GOLDEN, GRAPH, MANIFEST, WEIGHTS
    from edgekit.bundle.pack import pack

    manifest = asdict(bundle.manifest)
    parameters = bundle.parameters
    folder = bundle.path if bundle.path and bundle.path.is_dir() else None
    packed = bundle.path.stat().st_size if bundle.path and bundle.path.is_file() else len(pack(bundle))
    exports = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder else []
    return {
        "path": str(bundle.path) if bundle.path else None,
        "digest": bundle.digest,
        "parameters": parameters,
        "bytes": {"bundle": bundle.size, "packed": packed, "float32_weights": 4 * parameters},
        "exports": exports,
        "other_files": sorted(set(bundle.contents) - {MANIFEST, WEIGHTS, GRAPH, GOLDEN}),
        "manifest": manifest,
    }


def ancestry(bundle: Bundle) -> list[dict[str, Any]]:
    """From the first ancestor to the bundle itself: digest, the zoo's name for it where it is one of the zoo's, and the
    passes that were run on it."""
    from edgekit.bundle.zoo import folders
    from edgekit.compression.record import records_of
    from edgekit.importers.api import open_model

    names = {open_model(name).digest: name for name in folders()}
    steps: list[dict[str, Any]] = []
    for record in records_of(bundle):
        if not steps or steps[-1]["digest"] != record.parent:
            steps.append({"digest": record.parent, "name": names.get(str(record.parent)), "passes": []})
        told = {"parameters": record.parameters, "seed": record.seed, "kept": record.kept, "reason": record.reason}
        steps[-1]["passes"].append({"pass": record.name, **told})
    if not steps and bundle.manifest.parent:
        steps.append({"digest": bundle.manifest.parent, "name": names.get(bundle.manifest.parent), "passes": []})
    return [*steps, {"digest": bundle.digest, "name": bundle.manifest.name, "passes": []}]


def _show_lineage(steps: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(steps)
        return
    for step in steps:
        output.print(f"{step['digest'][:12] if step['digest'] else 'unknown'}  {step['name'] or ''}".rstrip())
        for item in step["passes"]:
            given = _pairs(item["parameters"])
            seed = "" if item["seed"] is None else f", seed {item['seed']}"
            verdict = "kept" if item["kept"] else "rolled back"
            output.print(f"  {verdict:11}  {item['pass']}: {given}{seed}; {item['reason']}")


def tensor_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """A row per tensor: name, shape, encoding, share of zeros, bytes at the code width with scales or codebook."""
    import numpy as np

    from edgekit.bundle.encoding import stored_bytes

    if bundle.is_graph:
        return _graph_rows(bundle)
    encodings = bundle.encodings()
    return [
        {
            "name": name,
            "shape": list(value.shape),
            "encoding": _encoding(encodings.get(name)),
            "zeros": float(np.mean(value == 0)),
            "bytes": stored_bytes({name: value}, encodings),
        }
        for name, value in sorted(bundle.weights().items())
    ]


def _graph_rows(bundle: Bundle) -> list[dict[str, Any]]:
    from edgekit.bundle.format import GRAPH
    from edgekit.bundle.onnx_file import learnt, load, to_array

    arrays = [(tensor.name, to_array(tensor)) for tensor in learnt(load(bundle.contents[GRAPH], str(bundle.path)))]
    return [
        {
            "name": name,
            "shape": list(array.shape),
            "encoding": str(array.dtype),
            "zeros": float((array == 0).mean()),
            "bytes": array.nbytes,
        }
        for name, array in sorted(arrays, key=lambda item: item[0])
    ]


def _encoding(encoding: Encoding | None) -> str:
    from edgekit.bundle.encoding import Affine

    if encoding is None:
        return "float32"
    return f"{'affine' if isinstance(encoding, Affine) else 'palette'} {encoding.bits} bit"


def _show(bundle: Bundle, found: dict[str, Any]) -> None:
    from edgekit.compression.record import COMPRESSION, records_of, summary_of

    manifest = found["manifest"]
    output.print(manifest["name"], style="bold")
    _columns([(name, str(value)) for name, value in _manifest_lines(found) if value not in (None, "")])
    if manifest["metrics"]:
        output.print("\nmetrics", style="bold")
        summary = summary_of(bundle)
        rest = {name: item for name, item in manifest["metrics"].items() if name != COMPRESSION or summary is None}
        lines = [line for name, item in rest.items() for line in _metric(name, item)]
        _columns(lines + (_compression(summary) if summary else []))
    if manifest["recipe"]:
        output.print("\nrecipe", style="bold")
        steps = [dict(step) for step in manifest["recipe"].get("pass", [])]
        _columns([(step.pop("name"), _pairs(step)) for step in steps])
    if records := records_of(bundle):
        _show_passes(records)


def _manifest_lines(found: dict[str, Any]) -> list[tuple[str, Any]]:
    manifest, sizes = found["manifest"], found["bytes"]
    return [
        ("family", manifest["family"]),
        ("arguments", _pairs(manifest["arguments"])),
        *(("input", _spec(spec)) for spec in manifest["inputs"]),
        *(("output", _spec(spec)) for spec in manifest["outputs"]),
        ("classes", ", ".join(manifest["classes"])),
        ("made from", _preprocessing(manifest["preprocessing"])),
        ("data set", manifest["data"]),
        ("target", manifest["target"]),
        ("seed", manifest["seed"]),
        ("versions", ", ".join(f"{name} {value}" for name, value in manifest["versions"].items())),
        ("parameters", f"{found['parameters']:,} ({sizes['float32_weights']:,} bytes as float32)"),
        ("packed", f"{sizes['packed']:,} bytes"),
        ("bundle", f"{sizes['bundle']:,} bytes"),
        ("exports", ", ".join(found["exports"])),
        ("other files", ", ".join(found["other_files"])),
        ("path", found["path"]),
        ("digest", found["digest"]),
        ("parent", manifest["parent"]),
    ]


def _show_passes(records: Sequence[PassRecord]) -> None:
    output.print("\npasses", style="bold")
    batches = next(("/".join(str(item.batch) for item in record.latency) for record in records if record.latency), "")
    speed = f"speed-up at batch {batches}" if batches else "speed-up"
    rows = [_state("original", "", records[0].before, "")]
    for record in records:
        factors = "/".join(f"{1 / item.ratio:.2f}" for item in record.latency)
        rows.append(_state(record.name, "kept" if record.kept else "rolled back", record.after, factors))
    print_table(["pass", "verdict", "quality", "packed", speed], rows)
    output.print()
    _columns([(record.name, record.reason) for record in records])


def _state(name: str, verdict: str, state: State | None, speed: str) -> list[str]:
    """Cells of one line; a pass that failed has no state after it."""
    if state is None:
        return [name, verdict, "-", "-", speed]
    return [name, verdict, f"{state.quality.value:.4f}", f"{state.bytes:,}", speed]


def _compression(summary: Summary) -> list[tuple[str, str]]:
    """Lines for what a compression measured."""
    latency = [
        (
            f"CPU ms at batch {item.batch}",
            f"{item.before_ms:.3g} > {item.after_ms:.3g}, {item.ratio:.2f} times the time "
            f"[{item.low:.2f}, {item.high:.2f}]",
        )
        for item in summary.latency
    ]
    original, change = summary.original, summary.change
    return [
        ("original", str(original)),
        ("change", f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}] (n = {change.samples:,})"),
        *latency,
        ("machine", f"{summary.machine['cpu']}, {summary.machine['cores']} cores"),
    ]


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"  # JSON has no NaN: the manifest holds null


def _metric(name: str, item: Any) -> list[tuple[str, str]]:
    """Lines for one metric: a measurement, a mean over seeds, or a table of numbers."""
    label = name.replace("_", " ")
    if not isinstance(item, dict):
        return [(label, _value(item))]
    if {"value", "low", "high", "samples"} <= set(item):
        value, low, high = (_number(item[key]) for key in ("value", "low", "high"))
        return [(label, f"{value} [{low}, {high}] (n = {item['samples']:,})")]
    if {"values", "mean"} <= set(item):
        half = item.get("half_width_95")
        spread = f" +- {half:.4f}" if half is not None else ""
        return [(label, f"{item['mean']:.4f}{spread}, {len(item['values'])} seeds")]
    if all(isinstance(value, float) for value in item.values()):
        ordered = sorted(item.items(), key=lambda pair: (len(pair[0]), pair[0]))  # "3" before "14"
        return [(label, ", ".join(f"{key}: {value:.3f}" for key, value in ordered))]
    return [line for key, value in item.items() for line in _metric(f"{label} {key}", value)]


def _columns(rows: list[tuple[str, str]]) -> None:
    """Names on the left, values wrapped beside them."""
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", max_width=24)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    output.print(table)


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in values.items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + _pairs(value) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _spec(spec: dict[str, Any]) -> str:
    shape = ", ".join(map(str, spec["shape"]))
    return f"{spec['name']} ({shape}) {spec['dtype']}" + (f", {spec['unit']}" if spec["unit"] else "")


def _preprocessing(value: dict[str, Any] | None) -> str | None:
    if value is None:
        return None
    return f"{value.get('id')}: " + _pairs({name: item for name, item in value.items() if name != "id"})
