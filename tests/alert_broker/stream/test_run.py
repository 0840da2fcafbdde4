"""What is done before the pipeline runs."""

from alert_broker.stream import config as configuration
from alert_broker.stream.run import open_pipeline
from alert_broker.stream.stats import Stats


def test_an_order_to_stop_ends_the_wait_for_a_broker():
    tables = {
        "source": {"topics": ["t"]},
        "output": [{"topic": "r"}],
        "kafka": {"bootstrap.servers": "127.0.0.1:1", "log_level": 0},
    }
    asked = []
    config = configuration.parse(tables, "test").check()
    assert open_pipeline(config, Stats(), lambda: bool(asked) or asked.append(1)) is None
    assert asked
