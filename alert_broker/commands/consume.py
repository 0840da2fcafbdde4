"""edgekit alerts consume"""

from __future__ import annotations

import contextlib
import gc
import typing
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from alert_broker.commands.common import alert_packages, key_values, stopping
from edgekit.cli.console import note, output, print_json, print_table, status

if TYPE_CHECKING:
    from alert_broker.stream.config import Config
    from alert_broker.stream.stats import Stats

EXAMPLES = """\b
Examples:
  edgekit alerts consume --config broker.toml
  edgekit alerts consume --kafka bootstrap.servers=localhost:9092 --topics ztf --output 'topic = "classified"'
A file, broker.toml:
  [kafka]
  "bootstrap.servers" = "localhost:9092"
  [source]
  topics = ["ztf"]
  [[output]]
  topic = "kilonovae"
  where = "best_class == 'KN' and best_probability > 0.8"
  format = "json"
"""


class Consume(click.Command):
    """A command with a flag for every value of the configuration's tables, so that flags and tables cannot differ."""

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        return [*super().get_params(context)[:-1], *flags(), super().get_params(context)[-1]]


def flags() -> Iterator[click.Option]:
    from dataclasses import fields

    from alert_broker.stream.config import Config

    for table, settings in typing.get_type_hints(Config).items():
        if not hasattr(settings, "__dataclass_fields__"):
            continue
        types_of = typing.get_type_hints(settings)
        for item in fields(settings):
            name = f"--{table}-{item.name}".replace("_", "-")
            hint, text = types_of[item.name], f"{item.metadata['help']}"
            shown = ", ".join(item.default) if isinstance(item.default, tuple) else item.default
            text += f" [default: {shown}]" if shown not in ("", False) else ""
            options: dict[str, Any] = {"help": text, "default": None}
            if hint is bool:
                options |= {"is_flag": True, "flag_value": True}
            elif typing.get_origin(hint) is tuple:
                options |= {"multiple": True}
            elif typing.get_origin(hint) is typing.Literal:
                options |= {"type": click.Choice(typing.get_args(hint))}
            else:
                options |= {"type": hint}
            # users type these most often, such as --until-eos
            short = [f"--{item.name}".replace("_", "-")] if table == "source" else []
            yield click.Option([name, *short, f"{table}__{item.name}"], **options)


@click.command(cls=Consume, epilog=EXAMPLES)
@click.option(
    "--config", "path", type=Path, help="TOML file with the configuration; each flag below replaces a value of it."
)
@click.option("--kafka", multiple=True, metavar="NAME=VALUE", help="A setting of librdkafka; env:NAME for a secret.")
@click.option(
    "--output", "outputs", multiple=True, metavar="TABLE", help="An [[output]] table, written as TOML on one line."
)
@click.option("--json", "as_json", is_flag=True, help="Print the ledger as JSON, and log lines as JSON.")
def consume(path: Path | None, kafka: tuple[str, ...], outputs: tuple[str, ...], as_json: bool, **values: Any) -> None:
    """Classify a stream of alerts from Kafka, and publish the results without losing an alert.

    Every alert is published, filtered out, or stored as a dead letter with its reason; its offset is committed after
    that. After Ctrl-C or SIGTERM the alerts in flight have source.stop_seconds to finish; the next run reads the rest
    again. A signal while it starts ends it at once, with status 143 for SIGTERM and 130 for Ctrl-C; nothing was read.
    The exit status is not 0 if the ledger does not add up. It is 75 if only a new process can continue, for example
    because a call into the Kafka client did not return: start the process again then.
    """
    with alert_packages():
        from alert_broker.stream import config as configuration
        from alert_broker.stream.clients import client_errors
        from alert_broker.stream.run import open_pipeline
        from alert_broker.stream.stats import Stats
        from alert_broker.stream.watchdog import MARGIN_SECONDS, WATCHDOG

    changes: dict[str, Any] = {}
    for name, value in values.items():
        if value is not None and value != ():
            table, _, item = name.partition("__")
            changes.setdefault(table, {})[item] = value
    if kafka:
        changes["kafka"] = key_values(kafka, "--kafka")
    if outputs:
        changes["output"] = [configuration.inline(text, "--output") for text in outputs]
    config, stats = configuration.load(path, changes), Stats()
    failed = ""
    WATCHDOG.last_words = lambda reason: report(stats, as_json, reason)
    try:
        with (
            watching(config, stats, as_json=as_json),
            client_errors(),
            WATCHDOG.ending_within(config.source.stop_seconds + MARGIN_SECONDS),
        ):
            pipeline = open_pipeline(config, stats, notify=note)  # a signal raises an exception here: see `main`
            assert pipeline is not None
            with stopping() as stop:
                pipeline.run(stop)
    except BaseException as error:
        failed = str(error) or type(error).__name__
        raise
    finally:
        report(stats, as_json, failed)
        gc.freeze()  # else Python's last collection takes a third of a second, and SIGTERM as much longer


@contextmanager
def watching(config: Config, stats: Stats, *, as_json: bool) -> Iterator[None]:
    """Keep logs, metrics and the dashboard active while the block runs."""
    from alert_broker.stream import dashboard, health, logs

    logs.configure(as_json=as_json, config=dict(config.kafka_settings()))
    with contextlib.ExitStack() as stack:
        if config.metrics.listen:
            host, _, port = config.metrics.listen.rpartition(":")
            stack.enter_context(health.serve(stats, host or "127.0.0.1", int(port)))
        stack.enter_context(dashboard.show(stats, False if as_json else None, console=status))
        yield


def report(stats: Stats, as_json: bool, failed: str) -> None:
    """Print the ledger, the classes and the reasons of dead letters. failed: the error that stopped the run, if there
    was one; the messages in flight then count as revoked, and the next run reads them again."""
    now = stats.snapshot()
    if as_json:
        images = {"cutouts": now.cutouts} if now.cutouts else {}
        print_json(
            {
                "failed": failed or None,
                "ledger": now.ledger.to_json(),
                "seconds": round(now.uptime, 3),
                "classes": dict(now.classes.most_common()),
                "reasons": dict(now.reasons.most_common()),
                "models": now.models,
                **images,
                "latency": {
                    name: {"p50": _finite(item.quantile(0.5)), "p99": _finite(item.quantile(0.99))}
                    for name, item in now.stages.items()
                },
            }
        )
        return
    columns = ["consumed", "published", "filtered", "dead_lettered", "in_flight"]
    columns += [column for column in ("revoked", "expired") if getattr(now.ledger.total(), column)]
    rows = [
        [name, *(f"{getattr(entry, column):,}" for column in columns)]
        for name, entry in [
            *((f"{t}[{n}]", e) for (t, n), e in sorted(now.ledger.entries.items())),
            ("all", now.ledger.total()),
        ]
    ]
    print_table(["partition", *(column.replace("_", "-") for column in columns)], rows)
    unscored = Counter({reason: number for reason, number in now.cutouts.items() if reason != "scored"})
    for title, counts in (
        ("most probable class", now.classes),
        ("no drb because", unscored),
        ("dead letters because", now.reasons),
    ):
        if counts:
            output.print()
            print_table([title, "alerts"], [[name, f"{number:,}"] for name, number in counts.most_common()])


def _finite(seconds: float) -> float | None:
    return seconds if seconds < float("inf") else None
