"""Measure what settings do to latency: from the producer's hand to a reader's, through `edgekit alerts consume`.

    EDGEKIT_KAFKA_HOME=... python tools/bench_latency.py --json benchmarks/latency.json

Real ZTF packets come at a fixed rate, by default 256 and 1,000 a second. Broker, producer, consumer and reader share
the machine's cores. The settings are measured in turns, `--rounds` times; the output has medians over the rounds, of
the percentiles and of the consumer's share of a core. Name settings to measure only these, such as `batch.seconds=0.02`
(joined by commas to change several at once); `defaults` changes nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

from bench_alerts import at_a_rate, broker_name, packets, simulated
from bench_inference import describe_machine

SETTINGS = ["defaults", "batch.seconds=0.02", "batch.seconds=0.03", "batch.seconds=0.1"]


def flags(setting: str) -> list[str]:
    """Return the command's flags for a setting, such as --batch-seconds 0.02 for batch.seconds=0.02."""
    if setting == "defaults":
        return []
    pairs = [item.partition("=") for item in setting.split(",")]
    return [part for name, _, value in pairs for part in (f"--{name.replace('.', '-').replace('_', '-')}", value)]


def median_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians over the rounds."""
    return {
        "latency_s": {key: statistics.median(row["latency_s"][key] for row in rows) for key in rows[0]["latency_s"]},
        "cpu_share_of_a_core": statistics.median(row["cpu_share_of_a_core"] for row in rows),
        "producer_late_s": max(row["producer_late_s"] for row in rows),
        "messages": sum(row["messages"] for row in rows),
    }


def line(setting: str, rate: float, row: dict[str, Any]) -> str:
    milliseconds = "  ".join(f"{key} {1e3 * value:4.0f} ms" for key, value in row["latency_s"].items())
    return f"{setting:40s} {rate:6,.0f}/s  {milliseconds}  {row['cpu_share_of_a_core']:.2f} of a core"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("settings", nargs="*", default=SETTINGS, help=f"[default: {' '.join(SETTINGS)}]")
    parser.add_argument("--data", type=Path, default=default, help="folder with alerts/; simulated packets without it")
    parser.add_argument("--rates", type=float, nargs="+", default=[256.0, 1000.0], help="messages per second")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the broker ends with this process
    real = (options.data / "alerts").is_dir()
    values = packets(options.data, "ztf*/*.avro") if real else simulated("ztf", 100)
    broker = broker_name()
    print(f"{broker}, {'real' if real else 'simulated'} ZTF packets", flush=True)
    measured: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for _ in range(options.rounds):
        for rate in options.rates:
            for setting in options.settings:
                row = at_a_rate(values, rate, options.seconds, *flags(setting))
                measured.setdefault((setting, rate), []).append(row)
                print(line(setting, rate, row), flush=True)
    medians = {key: median_of(rows) for key, rows in measured.items()}
    print(f"\nmedians of {options.rounds} rounds")
    for (setting, rate), row in medians.items():
        print(line(setting, rate, row))
    if options.json:
        report = {
            "machine": describe_machine(),
            "broker": broker,
            "packets": "real" if real else "simulated",
            "rounds": options.rounds,
            "rows": [{"setting": setting, "rate": rate, **row} for (setting, rate), row in medians.items()],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
