"""edgekit alerts evaluate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from alert_broker.commands.common import alert_packages
from edgekit.cli.console import output, print_json, print_table

EXAMPLES = """\b
Examples:
  edgekit alerts evaluate night.parquet --labels truth.parquet
  edgekit alerts evaluate night.parquet --labels classes.csv --json
"""


@click.command(epilog=EXAMPLES)
@click.argument("table", type=Path)
@click.option(
    "--labels",
    type=Path,
    required=True,
    help="Parquet or CSV file with the true classes: a column class, and alert_id or object_id.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the measures as JSON.")
def evaluate(table: Path, labels: Path, as_json: bool) -> None:
    """Measure the results of `classify` against true classes of your own.

    Log-loss gives all classes the same weight. The calibration error is that of the best class's probability; both are
    also shown by the number of detections that an alert has.
    """
    with alert_packages():
        from alert_broker.evaluation import evaluate_table

    found = evaluate_table(table, labels)
    if as_json:
        print_json(found)
        return
    rows: list[tuple[str, str]] = [("alerts", f"{found['alerts']:,}")]
    rows += [(name, f"{found[name]:,}") for name in ("unlabelled", "unclassified") if found[name]]
    rows += [("log-loss", _interval(found["log_loss"])), ("error rate", _interval(found["error_rate"]))]
    if "supernovae" in found:
        rows.append(("log-loss of SN II, Ibc and Ia", _interval(found["supernovae"])))
    if "auc_snia" in found:
        rows.append(("AUC of SN Ia against the rest", f"{found['auc_snia']:.3f}"))
    rows.append(("calibration error", f"{found['calibration_error']:.3f}"))
    print_table(["measure", "value [95 % interval]"], rows)
    if found["by_detections"]:
        print_table(
            ["detections", "alerts", "log-loss", "error rate", "calibration error"],
            [_by_detections(row) for row in found["by_detections"]],
        )
    else:
        output.print("there are too few alerts to show them by number of detections")


def _interval(item: dict[str, float]) -> str:
    return f"{item['value']:.3f} [{item['low']:.3f}, {item['high']:.3f}]"


def _by_detections(row: dict[str, Any]) -> list[str]:
    span = str(row["from"]) if row["from"] == row["to"] else f"{row['from']} to {row['to']}"
    span = f"{row['from']} and more" if row["to"] >= 10_000 else span
    return [
        span,
        f"{row['alerts']:,}",
        *(f"{row[name]:.3f}" for name in ("log_loss", "error_rate", "calibration_error")),
    ]
