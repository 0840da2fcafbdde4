"""edgekit doctor"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgekit.cli.console import output, print_json, status

if TYPE_CHECKING:
    from edgekit.doctor.checks import Check

EXAMPLE = """\b
Examples:
  edgekit doctor
  edgekit doctor --target tesla-p40
  edgekit doctor t2-gr --target jetson-nano
  edgekit doctor --json > there.json
  edgekit doctor --system there.json --target tesla-p40
"""
STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}


@click.command(epilog=EXAMPLE)
@click.argument("bundle", required=False)
@click.option("--target", "target_name", help="What it must work as: a name of `edgekit targets`, or a TOML file.")
@click.option("--system", "recorded", type=click.Path(path_type=Path), help="Judge a machine recorded with --json.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: what was observed, and the checks.")
def doctor(bundle: str | None, target_name: str | None, recorded: Path | None, as_json: bool) -> int:
    """Say what this machine can run, what stands in the way, and what to do about it.

    Without --target the machine's own is looked for. With BUNDLE: what the model asks for, held against the machine, or
    with --target against that device's profile. Exit status 1 if something cannot work.
    """
    from dataclasses import asdict

    from edgekit.doctor.checks import judge
    from edgekit.doctor.observe import observe
    from edgekit.doctor.stacks import guess
    from edgekit.doctor.system import read
    from edgekit.targets.profile import find, names

    target = find(target_name) if target_name else None
    if bundle and target and not recorded:
        return _bundle(bundle, target_name, as_json)
    if recorded:
        system = read(recorded)
    else:
        with status.status("looking at this machine"):
            system = observe()
    meant = target or guess(system, map(find, names()))
    checks = judge(system, meant, asked=target is not None)
    if as_json:
        print_json({"target": meant.name if meant else None, "guessed": target is None,
                    "checks": [asdict(check) for check in checks], "system": system.to_dict()})  # fmt: skip
    else:
        show(checks)
    return int(any(check.status == "error" for check in checks))


def show(checks: list[Check]) -> None:
    """A line each, and below it what to do."""
    from rich.text import Text

    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.status:8}", STYLES[check.status]), f"{check.name:{width}}  {check.finding}")
        output.print(line)
        if check.remedy:
            output.print(f"{'':8}{'':{width}}  fix: {check.remedy}")
