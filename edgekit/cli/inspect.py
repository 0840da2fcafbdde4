"""edgekit inspect"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from edgekit.cli.console import output, print_json, print_table, printable
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.bundle.format import Bundle
    from edgekit.compression.guard import State
    from edgekit.compression.record import PassRecord, Summary

EXAMPLE = """\b
Examples:
  edgekit inspect t2-gr
  edgekit inspect t2.edge --weights
  edgekit inspect t2.edgepack --json
  edgekit inspect --untrusted from-a-stranger.onnx
"""


@click.command(epilog=EXAMPLE)
@click.argument("bundle")
@click.option("--lineage", is_flag=True, help="List the bundles from which it was made, their passes and their seeds.")
@click.option("--weights", is_flag=True, help="List every tensor: shape, encoding, zeros, bytes.")
@click.option("--untrusted", is_flag=True, help="Open BUNDLE in a process without network and with few rights.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(bundle: str, lineage: bool, weights: bool, untrusted: bool, as_json: bool) -> None:
    """Show the contents of BUNDLE (a directory, a packed file or a model's name) and how it was made. BUNDLE may also
    be an .onnx file, a .pt2 file or a Hugging Face folder.

    With --untrusted a process of its own opens it. That process has no network, starts no programs, writes only in a
    temporary folder, and has limited memory and time, as far as the system allows; the command says which of these
    limits the system has."""
    if untrusted:
        flags = [name for name, given in (("--lineage", lineage), ("--weights", weights), ("--json", as_json)) if given]
        _show_confined(bundle, flags)
        return
    opened = _opened(bundle)
    try:
        _print(opened, lineage=lineage, weights=weights, as_json=as_json)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # the manifest's records have any content
        raise EdgekitError(
            f"{bundle}: its manifest cannot be shown ({type(error).__name__}: {error}); restore the file"
        ) from error


def _print(opened: Bundle, *, lineage: bool, weights: bool, as_json: bool) -> None:
    from edgekit.compression.describe import ancestry, describe, tensor_rows

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


def _opened(bundle: str) -> Bundle:
    from pathlib import Path

    from edgekit.bundle.format import MANIFEST
    from edgekit.importers.api import import_hugging_face, open_model

    path = Path(bundle)
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        return import_hugging_face(path)
    return open_model(bundle)


def _show_confined(bundle: str, flags: list[str]) -> None:
    """Run this command in a confined process, and print what it printed."""
    import json
    import os
    from pathlib import Path

    from edgekit.cli.console import note
    from edgekit.importers import sandbox

    path = os.path.abspath(bundle) if Path(bundle).exists() else bundle  # noqa: PTH100
    content = json.dumps([path, *flags]).encode()
    layers, _, text = (
        sandbox.run("edgekit.cli.inspect:confined", content, bundle).decode(errors="replace").partition("\n")
    )
    click.echo(printable(text, keep="\n\t"), nl=False)
    note(f"opened in a process of its own, confined by: {layers}")


def confined(content: bytes, source: str) -> bytes:
    """Return what the command prints, after a line with the layers that confine this process."""
    import contextlib
    import io
    import json

    from edgekit.importers import sandbox

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        inspect.main(json.loads(content), standalone_mode=False)
    return f"{', '.join(sandbox.layers())}\n{printed.getvalue()}".encode(errors="backslashreplace")


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
        ("state", ", ".join(f"{output} becomes {name}" for name, output in manifest["state"].items())),
        ("rows of a call", manifest.get("rows_per_call")),
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
    """Return the cells of one line; a pass that failed has no state after it."""
    if state is None:
        return [name, verdict, "-", "-", speed]
    return [name, verdict, f"{state.quality.value:.4f}", f"{state.bytes:,}", speed]


def _compression(summary: Summary) -> list[tuple[str, str]]:
    """Return the lines for the measurements of a compression."""
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
    return "nan" if value is None else f"{value:.4f}"  # JSON has no NaN, so the manifest holds null


def _metric(name: str, item: Any) -> list[tuple[str, str]]:
    """Return the lines for one metric: a measurement, a mean over seeds, or a table of numbers."""
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
    """Print names on the left and wrapped values on the right."""
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
    own = f", of its own ({', '.join(map(str, spec['axes']))})" if spec.get("axes") is not None else ""
    return f"{spec['name']} ({shape}) {spec['dtype']}" + (f", {spec['unit']}" if spec["unit"] else "") + own


def _preprocessing(value: dict[str, Any] | None) -> str | None:
    if value is None:
        return None
    return f"{value.get('id')}: " + _pairs({name: item for name, item in value.items() if name != "id"})
