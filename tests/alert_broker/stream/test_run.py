"""What is done before the pipeline runs, and errors of the client that nothing else has explained."""

import pytest
from confluent_kafka import KafkaError, KafkaException

from alert_broker.stream import config as configuration
from alert_broker.stream.run import client_errors, open_pipeline
from alert_broker.stream.stats import Stats
from edgekit.errors import EdgekitError


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


def test_an_error_of_the_client_is_one_line():
    with pytest.raises(EdgekitError, match=r"the Kafka client failed: .*; start again to continue"), client_errors():
        raise KafkaException(KafkaError(KafkaError._TRANSPORT))
    with pytest.raises(ZeroDivisionError), client_errors():
        raise ZeroDivisionError
