"""edgekit doctor"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgekit.cli.console import output, print_json, printable, status

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekit.doctor.finding import Finding
    from edgekit.doctor.needs import Needs
    from edgekit.targets.profile import Target

EXAMPLE = """\b
Examples:
  edgekit doctor
  edgekit doctor --target tesla-p40
  edgekit doctor t2-gr --target jetson-nano
  edgekit doctor --json > there.json
  edgekit doctor --system there.json --target tesla-p40
"""
LONG = 60  # characters; a longer remedy is printed only once
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@click.command(epilog=EXAMPLE)
@click.argument("bundle", required=False)
@click.option("--target", "target_name", help="The device to check for: a name of `edgekit targets`, or a TOML file.")
@click.option(
    "--system", "recorded", type=click.Path(path_type=Path), help="Check the machine in this file, which --json wrote."
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Rows for which the memory of BUNDLE is estimated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the observed facts and the checks as JSON.")
def doctor(bundle: str | None, target_name: str | None, recorded: Path | None, batch: int, as_json: bool) -> int:
    """Say what this machine can run, what prevents the rest, and how to fix it.

    Without --target, edgekit recognises the target of this machine. With BUNDLE, it compares what the model requires
    with this machine, or, with --target, with the profile of that device. The exit status is 1 if something cannot
    work.
    """
    from dataclasses import asdict

    from edgekit.doctor import needs as model
    from edgekit.doctor.checks import judge
    from edgekit.doctor.observe import observe
    from edgekit.doctor.stacks import guess
    from edgekit.doctor.system import read
    from edgekit.targets.profile import find, names

    target, system = find(target_name) if target_name else None, None
    if recorded:
        system = read(recorded)
    elif not (bundle and target):
        with status.status("examining this machine"):
            system = observe()
    meant = target or (guess(system, map(find, names())) if system else None)
    checks = judge(system, meant, asked=target is not None) if system else []
    report: dict[str, Any] = {"target": meant.name if meant else None, "guessed": target is None}
    if bundle:
        needs, stored = _needs(bundle, batch)
        checks += (judged := model.judge(needs, meant, system))
        if meant is not None and all((check.name, check.status) != ("precision", "error") for check in judged):
            checks += _parsers(stored, meant)
        report["needs"] = asdict(needs)
    report["checks"] = [asdict(check) for check in checks]
    if as_json:
        print_json(report | ({"system": system.to_dict()} if system else {}))
    else:
        show(checks)
    return int(any(check.status == "error" for check in checks))


def _needs(bundle: str, batch: int) -> tuple[Needs, ModelProto | None]:
    """Return what a bundle requires, and its graph. A network is lowered to a graph if torch is installed."""
    from importlib.util import find_spec

    from edgekit.bundle.format import GRAPH
    from edgekit.doctor.needs import of
    from edgekit.importers.files import resolve
    from edgekit.importers.onnx import try_out

    opened, graph = try_out(resolve(bundle)), None  # sizes are found by computing parts of the graph in this process
    if opened.is_graph:
        from edgekit.bundle.onnx_file import load

        graph = load(opened.contents[GRAPH], bundle)
    elif find_spec("torch") and find_spec("onnx") and find_spec("onnxruntime"):
        from edgekit.graph.lower import lower

        with status.status("exporting the model to find out what it requires"):
            graph = lower(opened, weights="float32")
    return of(opened, graph, batch), graph


def _parsers(graph: ModelProto | None, target: Target) -> list[Finding]:
    """Say whether each TensorRT parser of the target accepts the model as an export would write it: in the opset of the
    parser and the precision of the plan."""
    from edgekit.doctor.finding import Finding

    if not any(stack.runtime.startswith("tensorrt") for stack in target.stacks):
        return []
    if graph is None:
        return [
            Finding(
                "operators",
                "warning",
                "TensorRT's parsers were not run: the network cannot be exported without torch",
                "run this on a machine with torch, or: pip install 'edgekit[compress]'",
            )
        ]
    from edgekit import plugins
    from edgekit.errors import EdgekitError
    from edgekit.exporter import load_exporter

    verdicts: dict[str, str] = {}  # by stack: why its parser refuses
    taken = []
    for stack in target.stacks:
        if stack.runtime not in plugins.names("edgekit.exporters"):  # a runtime that reads plain ONNX
            continue
        try:
            answer = load_exporter(stack.runtime).accepts(graph, target, stack)
        except EdgekitError as error:
            verdicts[stack.name] = str(error)
        else:
            taken += [Finding("operators", "ok", answer)] if answer else []
    others = [stack.name for stack in target.stacks if stack.name not in verdicts]
    verdict: Literal["warning", "error"] = "warning" if others else "error"
    remedy = f"use {others[0]}" if others else "rewrite that layer, or run the model on another device"
    return [*taken, *(Finding("operators", verdict, f"{name}: {why}", remedy) for name, why in verdicts.items())]


def show(checks: list[Finding]) -> None:
    """Print one line for each finding, and the remedy below it."""
    from rich.text import Text

    width = max(len(check.name) for check in checks)
    said: set[str] = set()
    for check in checks:
        finding = printable(f"{check.name:{width}}  {check.finding}")
        line = Text.assemble((f"{check.status:8}", STYLES[check.status]), finding)
        output.print(line)
        if check.remedy:
            again = check.remedy in said and len(check.remedy) > LONG
            output.print(f"{'':8}{'':{width}}  fix: {'the same as above' if again else check.remedy}")
            said.add(check.remedy)
