"""edgekit alerts check"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click

from alert_broker.commands.common import alert_packages, key_values, stopping
from edgekit.cli.console import print_json, print_table
from edgekit.errors import EdgekitError

SECONDS = 30.0  # to wait for a broker; a consumer waits as long as it takes
EXAMPLES = """\b
Example:
  edgekit alerts check --config broker.toml
"""


@click.command(epilog=EXAMPLES)
@click.option("--config", "path", type=Path, required=True, help="TOML file of the consumer.")
@click.option("--kafka", multiple=True, metavar="NAME=VALUE", help="A setting of librdkafka; env:NAME for a secret.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(path: Path, kafka: tuple[str, ...], as_json: bool) -> None:
    """Try what a consumer needs of its broker, without consuming, and print a table.

    It connects, authenticates, and looks for the topics and for the rights to read, to write and to commit. It reads no
    alert, writes none and commits nothing. If the consumer publishes exactly once, it also starts a producer with the
    consumer's transactional id; a consumer that runs at the same time then makes itself a new producer. The exit status
    is 1 if something is missing, or if the broker has not answered within 30 seconds.
    """
    with alert_packages():
        from alert_broker.stream import config as configuration
        from alert_broker.stream import logs
        from alert_broker.stream.clients import client_errors
        from alert_broker.stream.connect import reach
        from alert_broker.stream.rights import Finding, all_rights

    config = configuration.load(path, {"kafka": key_values(kafka, "--kafka")} if kafka else {})
    settings = config.kafka_settings()
    logs.configure(as_json=as_json, config=settings)
    with stopping() as stop, client_errors():
        end = time.monotonic() + SECONDS
        client = reach(settings, lambda: stop() or time.monotonic() > end)
        if client is None and not stop():
            raise EdgekitError(
                f"the broker {settings['bootstrap.servers']!r} has not answered within {SECONDS:g} s; check "
                "bootstrap.servers in [kafka], and that the broker runs"
            )
        if client is None:
            raise EdgekitError("the check was stopped before the broker answered")
        server = Finding(f"broker {settings['bootstrap.servers']!r}", "connect, authenticate")
        findings = [server, *all_rights(client, config)]
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        rows = [[finding.thing, finding.right, finding.problem or "good"] for finding in findings]
        print_table(["what", "needed", "found"], rows)
    if problems := [finding.problem for finding in findings if finding.problem]:
        more = f"; {len(problems) - 1} more in the table" if len(problems) > 1 else ""
        raise EdgekitError(problems[0] + more)
