"""Send hostile messages through the stages of the stream, without a broker: decoding, classifying, routing, publishing.

    python tools/fuzz_messages.py --seconds 600 --json benchmarks/fuzz_messages.json

Something in each message is not as it should be: its value, key, headers or timestamp (`tests/alert_broker/stream/
hostile.py`). Three things are checked: each message has one outcome, a result in both outputs or one dead letter; the
producer accepts what is sent; no batch takes longer than `MOST_SECONDS`. A failure names the seed of its batch, and
`--seed` repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from check_gp_parity import describe_machine

from alert_broker import simulated_packets
from alert_broker.simulate import simulate
from alert_broker.stream import config as configuration
from alert_broker.stream.dead_letters import REASON, category_of, text_of
from edgekit.bundle.store import write_bundle
from edgekit.errors import EdgekitError
from tests.alert_broker.small import small_bundle
from tests.alert_broker.stream.hostile import InMemory, hostile

BATCH = 64  # messages
MOST_SECONDS = 20.0  # that a batch may take; it usually takes a tenth of a second
CATEGORIES = 20  # of dead letters that are reported


def open_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> InMemory:
    """The stages with a small model, two outputs and no limit of dead letters."""
    bundle = write_bundle(small_bundle(), folder / "small.edge").path
    tables = {
        "source": {"topics": ["source"]},
        "model": {"bundle": str(bundle), "reuse": "off"},
        "output": [{"topic": "results", "format": "json", "attach": "packet"}, {"topic": "avro"}],
        "dead_letters": {"topic": "dead", "max_ratio": 1.0, "max_consecutive": 10**9},
        "archive": {"folder": str(folder / "archive")},
        "kafka": {"bootstrap.servers": "127.0.0.1:1"},
    }
    return InMemory(configuration.parse(tables, "the fuzzer").check(), monkeypatch)


def run_batch(stages: InMemory, packets: list[bytes], seed: int) -> Counter[str]:
    """Counts of results and of the categories of dead letters."""
    rng = random.Random(seed)
    messages = [hostile(rng, rng.choice(packets)) for _ in range(BATCH)]
    began = time.monotonic()
    found = Counter(stages.run(messages))
    taken = time.monotonic() - began
    by_topic: dict[str, set[int]] = {"results": set(), "avro": set(), "dead": set()}
    for topic, offset in found:
        by_topic[topic].add(offset)
    results, dead = by_topic["results"], by_topic["dead"]
    whole = dead | results == set(range(BATCH)) and not dead & results and results == by_topic["avro"]
    if not whole or set(found.values()) != {1}:
        raise EdgekitError(f"batch {seed}: a message has no outcome or more than one; repeat with --seed {seed}")
    if taken > MOST_SECONDS:
        raise EdgekitError(f"batch {seed} took {taken:.1f} s; allowed {MOST_SECONDS:.0f} s; repeat with --seed {seed}")
    reasons = [text_of(dict(message.headers)[REASON]) for message in stages.sent if message.topic == "dead"]
    return Counter({"results": len(results)}) + Counter(map(category_of, reasons))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    machine = describe_machine()
    packets = [
        simulated_packets.message(name, item.packet) for name in ("ztf", "lsst") for item in simulate(name, 20, 3)
    ]
    counts: Counter[str] = Counter()
    slowest, seed, began = 0.0, options.seed, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        stages = open_stages(Path(folder), monkeypatch)
        while time.monotonic() - began < options.seconds:
            started = time.monotonic()
            counts += run_batch(stages, packets, seed)
            slowest = max(slowest, time.monotonic() - started)
            seed += 1
            if seed % 200 == 0:
                print(f"{counts.total():,} messages, {counts['results']:,} results", file=sys.stderr, flush=True)
    report: dict[str, Any] = {
        "machine": machine, "seed": options.seed, "messages": counts.total(), "results": counts["results"],
        "dead_letters": dict((counts - Counter({"results": counts["results"]})).most_common(CATEGORIES)),
        "slowest_batch_seconds": round(slowest, 3), "seconds": round(time.monotonic() - began, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in report.items() if name != "machine"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
