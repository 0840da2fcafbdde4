"""edgekit alerts redrive"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from alert_broker.commands.common import alert_packages, key_values, stopping
from edgekit.cli.console import output, print_json, progress

EXAMPLES = """\b
Examples:
  edgekit alerts redrive --config broker.toml
  edgekit alerts redrive --config broker.toml --reason 'unknown LSST schema id'
"""


@click.command(epilog=EXAMPLES)
@click.option(
    "--config", "path", type=Path, required=True, help="TOML file of the consumer that wrote the dead letters."
)
@click.option("--kafka", multiple=True, metavar="NAME=VALUE", help="A setting of librdkafka; env:NAME for a secret.")
@click.option("--reason", default="", help="Send only dead letters whose reason contains this text.")
@click.option("--to-topic", default="", help="Topic to send to [default: the original topic of each dead letter]")
@click.option("--group", default="", help="Consumer group that stores the progress of redrive [default: GROUP-redrive]")
@click.option(
    "--max-attempts",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Skip dead letters that have failed more than this many times.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON.")
def redrive(
    path: Path, kafka: tuple[str, ...], reason: str, to_topic: str, group: str, max_attempts: int, as_json: bool
) -> None:
    """Send dead letters to the topics where they were read, after the cause of their failure is fixed.

    Restart the consumer with the fix, then run redrive: the consumer reads the alerts from its topic again. Other
    consumers of that topic read them again too; --to-topic sends them to a separate topic instead, which the consumer
    must read as well. A dead letter that fails again becomes a new dead letter, which counts its failures; the next run
    handles it.

    Dead letters stay in their topic. The consumer group GROUP-redrive records which were sent or skipped, and handles
    none of them twice. To run with another --reason, name another --group, which starts at the first dead letter. A
    dead letter over the size limit was stored without its payload; redrive re-reads it from the original topic,
    partition and offset.
    """
    with alert_packages():
        from alert_broker.stream import config as configuration
        from alert_broker.stream import logs
        from alert_broker.stream.clients import client_errors
        from alert_broker.stream.redrive import redrive as send

    changes = {"kafka": key_values(kafka, "--kafka")} if kafka else {}
    config = configuration.load(path, changes)
    settings = config.kafka_settings()
    logs.configure(as_json=as_json, config=settings)
    with progress() as bar, stopping() as stop, client_errors():
        task = bar.add_task("dead letters", total=None)
        done = send(
            settings,
            config.dead_letters,
            group=group or f"{config.source.group}-redrive",
            reason=reason,
            to_topic=to_topic,
            max_attempts=max_attempts,
            stop=stop,
            progress=lambda count: bar.update(task, completed=count),
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        gone = f", {done.gone:,} without their alert, which the topic no longer holds" if done.gone else ""
        output.print(f"{done.sent:,} dead letters sent again, {done.passed_over:,} skipped{gone}")
