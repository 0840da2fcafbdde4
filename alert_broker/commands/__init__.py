"""edgekit alerts: classify alerts from files, simulate alerts, and serve the stream. Each verb is a module of this
package."""

from __future__ import annotations

import click

from edgekit.cli import LazyGroup

VERBS = {
    verb: f"alert_broker.commands.{verb}:{verb}"
    for verb in ("classify", "evaluate", "simulate", "check", "consume", "replay", "redrive")
}


@click.group(cls=LazyGroup, lazy=VERBS)
def alerts() -> None:
    """Classify astronomical alerts from files or from Kafka, and simulate them."""
