"""edgekit alerts: alerts from files, simulated ones, and the stream. Each verb is a module of this package."""

from __future__ import annotations

import click

from edgekit.cli import LazyGroup

COMMANDS = {
    "classify": ("edgekit.cli.alerts.classify:classify", "Classify the alerts in files and folders."),
    "simulate": ("edgekit.cli.alerts.simulate:simulate", "Write simulated alerts to files, or to a topic."),
    "consume": (
        "edgekit.cli.alerts.consume:consume",
        "Classify a stream of alerts from Kafka, and publish the results.",
    ),
    "replay": ("edgekit.cli.alerts.replay:replay", "Send the packets in files to a topic."),
    "redrive": ("edgekit.cli.alerts.redrive:redrive", "Send dead letters to where they came from."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def alerts() -> None:
    """Classify astronomical alerts, from files or from Kafka."""
