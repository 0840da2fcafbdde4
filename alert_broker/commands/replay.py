"""edgekit alerts replay"""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from alert_broker.commands.common import MEGABYTE, alert_packages, key_values, stopping
from edgekit.cli.console import output, print_json, progress

EXAMPLES = """\b
Examples:
  edgekit alerts replay night.tar --topic ztf --kafka bootstrap.servers=localhost:9092 --rate 256
  edgekit alerts replay packets/ --topic lsst --kafka bootstrap.servers=localhost:9092
"""


@click.command(epilog=EXAMPLES)
@click.argument("paths", nargs=-1, required=True)
@click.option("--topic", required=True, help="Topic to send to.")
@click.option("--kafka", multiple=True, metavar="NAME=VALUE", help="A setting of librdkafka; env:NAME for a secret.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Packets per second; 0 sends them as fast as the broker accepts them.",
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, show_default=True, help="Number of times to send all packets."
)
@click.option("--column", default="", help="Column of Parquet files that holds packets [default: packet or value]")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def replay(
    paths: tuple[str, ...], topic: str, kafka: tuple[str, ...], rate: float, repeat: int, column: str, as_json: bool
) -> None:
    """Send the packets in files, folders and tar archives to a topic, one packet per message, as a survey sends them.

    Damaged files are sent unchanged. Files of many packets are split into messages. If a Parquet file has a column of
    packets, they are sent unchanged. If it has none but its rows are a survey's alerts, such as Fink's, they are sent
    as Avro with the table's own schema: the light curves are the same, but the bytes are not those of the survey.
    """
    with alert_packages():
        from alert_broker.stream import logs
        from alert_broker.stream import replay as stream
        from alert_broker.stream.clients import client_errors
        from alert_broker.stream.config import secrets_from_environment

    settings = secrets_from_environment(key_values(kafka, "--kafka"))
    logs.configure(as_json=as_json, config=settings)
    source = itertools.chain.from_iterable(stream.packets(map(Path, paths), column) for _ in range(repeat))
    with progress() as bar, stopping() as stop, client_errors():
        task = bar.add_task(f"packets to {topic}", total=None)
        sent = stream.send(
            source, topic, settings, rate=rate, stop=stop, progress=lambda count, _: bar.update(task, completed=count)
        )
    report(topic, sent.messages, sent.bytes, sent.seconds, sent.late, as_json)


def report(topic: str, messages: int, size: int, seconds: float, late: float, as_json: bool) -> None:
    if as_json:
        print_json({"topic": topic, "messages": messages, "bytes": size, "seconds": seconds, "late_seconds": late})
        return
    behind = f", at most {late:.1f} s behind the rate" if late > 0.1 else ""
    output.print(
        f"{topic}: {messages:,} packets, {size / MEGABYTE:,.1f} MB in {seconds:.1f} s, "
        f"{messages / max(seconds, 1e-9):,.0f}/s{behind}"
    )
