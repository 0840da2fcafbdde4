"""edgekit models"""

from __future__ import annotations

import click

from edgekit.cli.console import note, output, print_json, print_table

EXAMPLE = """\b
Examples:
  edgekit models --json
  edgekit models get smollm2
"""


@click.group(invoke_without_command=True, epilog=EXAMPLE)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the models that come with edgekit, or get another one."""
    if context.invoked_subcommand is None:
        _list(as_json)


@models.command(epilog="Example: edgekit models get smollm2")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def get(name: str, as_json: bool) -> None:
    """Download the language model NAME and install it for `edgekit llm`."""
    from edgekit.importers.downloads import get as install

    path = install(name, note)
    if as_json:
        print_json({"name": name, "path": str(path)})


def _list(as_json: bool) -> None:
    from edgekit.bundle.store import open_bundle
    from edgekit.bundle.zoo import folders

    found = []
    for name, folder in folders().items():
        bundle = open_bundle(folder)
        manifest = bundle.manifest
        loss = manifest.metrics.get("log_loss", {})
        found.append(
            {
                "name": name,
                "family": manifest.family,
                "parameters": bundle.parameters,
                "inputs": {spec.name: spec.shape_text for spec in manifest.inputs},
                "classes": len(manifest.classes),
                "log_loss": loss.get("value"),
                "data": manifest.data,
                "path": str(folder),
            }
        )
    if as_json:
        print_json(found)
        return
    rows = [
        [
            item["name"],
            item["family"],
            f"{item['parameters']:,}",
            item["classes"],
            item["data"] or "",
            "" if item["log_loss"] is None else f"{item['log_loss']:.3f}",
        ]
        for item in found
    ]
    print_table(["model", "family", "parameters", "classes", "data set", "log-loss"], rows)
    output.print("\nEach model's card: README.md in its folder (edgekit models --json prints the paths).")
