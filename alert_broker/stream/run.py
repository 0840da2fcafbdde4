"""Wait for the broker, open the pipeline and run it."""

from __future__ import annotations

from collections.abc import Callable

from alert_broker.stream.clients import client_errors
from alert_broker.stream.config import Config
from alert_broker.stream.connect import reach
from alert_broker.stream.pipeline import Pipeline
from alert_broker.stream.rights import require_topics
from alert_broker.stream.stats import Stats


def open_pipeline(
    config: Config,
    stats: Stats,
    stop: Callable[[], bool] = lambda: False,
    notify: Callable[[str], None] = lambda message: None,
) -> Pipeline | None:
    """Wait for the broker, then open models, topics and clients; None if `stop` comes before the broker answers."""
    client = reach(config.kafka_settings(), stop)
    if client is None:
        return None
    require_topics(client, config)
    return Pipeline(config, stats, notify=notify)


def run(
    config: Config, stats: Stats, stop: Callable[[], bool], notify: Callable[[str], None] = lambda message: None
) -> None:
    """Wait for the broker, then consume until `stop` or, if so configured, the end."""
    with client_errors():
        pipeline = open_pipeline(config, stats, stop, notify)
        if pipeline is not None:
            pipeline.run(stop)
