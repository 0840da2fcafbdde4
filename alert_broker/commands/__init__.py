"""edgekit alerts: alerts from files, simulated ones, and the stream. Each verb is a module of this package."""

from __future__ import annotations

import click

from edgekit.cli import LazyGroup

COMMANDS = {
    "classify": ("alert_broker.commands.classify:classify", "Classify the alerts in files and folders."),
    "simulate": ("alert_broker.commands.simulate:simulate", "Write simulated alerts to files, or to a topic."),
    "consume": (
        "alert_broker.commands.consume:consume",
        "Classify a stream of alerts from Kafka, and publish the results.",
    ),
    "replay": ("alert_broker.commands.replay:replay", "Send the packets in files to a topic."),
    "redrive": ("alert_broker.commands.redrive:redrive", "Send dead letters to where they came from."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def alerts() -> None:
    """Classify astronomical alerts, from files or from Kafka."""
