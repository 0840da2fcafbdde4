"""edgekit targets"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgekit.cli.console import output, print_json, print_table

if TYPE_CHECKING:
    from edgekit.targets.profile import PrecisionPlan, Stack, Target

EXAMPLE = """\b
Examples:
  edgekit targets
  edgekit targets tesla-p40
  edgekit targets jetson-orin-nano-8gb --json
To add a device of your own, put a TOML file into ~/.config/edgekit/targets. `--json` prints the paths of the profiles.
"""


@click.command(epilog=EXAMPLE)
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def targets(name: str | None, as_json: bool) -> None:
    """List the devices that edgekit knows, or show the profile of one: NAME, or a TOML file.

    The rate of a CPU is that of one core; every other rate is that of the whole device. A profile also lists what must
    never be used: precisions that are slow there without any warning, and software that contains no code for the
    device.
    """
    from dataclasses import asdict

    from edgekit.targets import profile

    if name is not None:
        target = profile.find(name)
        if as_json:
            print_json({**asdict(target), "path": str(profile.path_of(name))})
        else:
            _show(target)
        return
    found = [profile.find(item) for item in profile.names()]
    if as_json:
        print_json([{**asdict(target), "path": str(profile.path_of(target.name))} for target in found])
        return
    rows = [
        [
            target.name,
            f"{target.memory.value / 1e9:g}",
            f"{target.bandwidth.value / 1e9:g}",
            *(_rate(target, precision) for precision in ("float32", "float16", "int8")),
            target.plan.order[0],
        ]
        for target in found
    ]
    print_table(["target", "GB", "GB/s", "float32", "float16", "int8", "first"], rows)
    output.print("\nRates: 10^12 operations a second, dense; of one core for a CPU. first: the precision to try first.")
    output.print("Software, what never to use, and where each figure is from: edgekit targets NAME")


def _rate(target: Target, precision: str) -> str:
    rate = target.rates.get(precision)
    return f"{rate.dense.value / 1e12:.4g}" if rate else "-"


def _show(target: Target) -> None:
    from edgekit.targets.profile import PRECISIONS

    units = ", ".join(f"{count:g} {unit}" for unit, count in target.units.items())
    capability = f"compute capability {target.compute_capability}" if target.compute_capability else ""
    output.print(", ".join(filter(None, [f"{target.name}: {target.title}", capability, units])))
    for note in target.notes:
        output.print(f"  {note}")
    shared = ", shared with the host's programs" if target.unified_memory else ""
    facts = [
        ("memory", f"{target.memory.value / 1e9:g} GB{shared}", target.memory.source),
        ("bandwidth", f"{target.bandwidth.value / 1e9:g} GB/s", target.bandwidth.source),
        ("launch", f"{target.launch.value * 1e6:g} us", target.launch.source),
    ]
    for precision in (item for item in PRECISIONS if item in target.rates):
        rate = target.rates[precision]
        sparse = f" ({rate.sparse.value / 1e12:.4g} sparse)" if rate.sparse else ""
        note = f"; {rate.note}" if rate.note else ""
        facts.append((precision, f"{rate.dense.value / 1e12:.4g}{sparse}", rate.dense.source + note))
    output.print()
    print_table(["figure", "value", "source"], facts)
    if target.power:
        output.print()
        print_table(
            ["power mode", "W", "rates", "bandwidth", "source"],
            [
                [mode.name, f"{mode.watts:g}", f"{mode.share:.0%}", f"{mode.bandwidth_share:.0%}", mode.source]
                for mode in target.power
            ],
        )
    _show_plan(target.plan)
    for number, stack in enumerate(target.stacks):
        output.print(f"\n{'software, recommended' if number == 0 else 'or'}: {stack.name}")
        for key, value in _facts(stack):
            output.print(f"  {key}: {value}")
    if target.never:
        output.print("\nnever:")
    for item in target.never:
        requirement = f" ({item.requirement})" if item.requirement else ""
        output.print(f"  {item.what}{requirement}: {item.why} [{item.source}]")


def _show_plan(plan: PrecisionPlan) -> None:
    output.print(f"\nuse, best first: {', '.join(plan.order)}; channels in multiples of {plan.round_to}")
    if plan.int8 != "none":
        output.print(f"int8 graphs: {plan.int8}")
    if plan.never:
        output.print(f"never: {', '.join(plan.never)}")
    output.print(f"why: {plan.reason}")


def _facts(stack: Stack) -> list[tuple[str, str]]:
    values = {
        "runtime": ", ".join(filter(None, [stack.runtime, stack.provider])),
        "TensorRT": ", ".join(filter(None, [stack.tensorrt, stack.typing and f"{stack.typing}ly typed networks"])),
        "CUDA": stack.cuda,
        "cuDNN": stack.cudnn,
        "driver": stack.driver,
        "JetPack": stack.jetpack,
        "Python": stack.python,
        "ONNX opset": str(stack.opset or ""),
        "pip install": " ".join(f'"{line}"' for line in stack.requirements),
        "source": stack.source,
    }
    return [(key, value) for key, value in values.items() if value]
