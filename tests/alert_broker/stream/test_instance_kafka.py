"""A real Kafka that is away for longer than a session: the static member joins again by itself, or is started again by
its supervisor. It never takes its own old requests for those of another process."""

import random
import time

import pytest

from tests.alert_broker.stream.conftest import REAL
from tests.alert_broker.stream.rig import Rig, repeat
from tests.alert_broker.stream.supervised import MODES, Supervised, check
from tests.alert_broker.stream.test_faults import BATCH, Feed
from tests.apache_kafka import ApacheKafka, missing

ABSENCES = 4

pytestmark = [pytest.mark.kafka, pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.mark.parametrize("mode", MODES)
def test_a_broker_is_away_for_longer_than_a_session_again_and_again(bundle, packets, tmp_path, mode):
    rng, session = random.Random(25), float(REAL["session.timeout.ms"]) / 1000.0
    with ApacheKafka(tmp_path / "kafka") as cluster:
        rig = Rig(cluster.address, REAL, tmp_path, bundle)
        feed = Feed(rig, repeat(packets, 600 + 500 * ABSENCES), 50.0)
        feed.start()
        supervised = Supervised(
            rig, source={"until_eos": False, "instance": "one"}, batch={"size": BATCH}, publish=MODES[mode]
        )
        for _ in range(ABSENCES):
            time.sleep(rng.uniform(2.0, 5.0))
            cluster.kill()
            time.sleep(session + rng.uniform(-2.0, 2.0))
            cluster.start()
            supervised.look()
        feed.join(300)
        assert feed.error is None
        supervised.wait_until_committed(feed.sent)
        supervised.end()
        check(supervised, feed.sent, mode, ABSENCES)
        assert supervised.statuses[1] == 0
