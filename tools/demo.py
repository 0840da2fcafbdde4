"""Run the main job end to end: compress t2, export it, verify it, classify thousands of alerts, then a night as a
stream.

    make demo            # or: python tools/demo.py --output FOLDER

The tool writes everything to demo/. It downloads the training data from PyPI (82 MB, once) unless it finds a folder
with it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from demo_stream import RATE, stream
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("EDGEKIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
console = Console(highlight=False)


def edgekit(*arguments: object) -> Any:
    """Run the command as a user would, and return its JSON if the arguments ask for JSON."""
    command = [sys.executable, "-c", "from edgekit.cli import main; main()", *map(str, arguments)]
    shown = " ".join(str(item) for item in arguments if item != "--json")
    console.print(f"\n[bold]$ edgekit {shown}[/bold]")
    started = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"demo: `edgekit {shown}` failed with status {done.returncode}")
    console.print(f"  {time.perf_counter() - started:.1f} s")
    return json.loads(done.stdout) if "--json" in arguments else done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "demo")
    parser.add_argument("--alerts", type=int, default=2000, help="simulated alerts of each survey")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the broker ends with this process
    out = options.output
    if out.exists():
        if not (out / ".edgekit-demo").is_file() and any(out.iterdir()):
            sys.exit(f"demo: {out} holds other files; name an empty folder with --output")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / ".edgekit-demo").touch()
    source = ["--from", str(REAL / "train")] if (REAL / "train").is_dir() else []
    edgekit("data", "plasticc-gr", *source)
    ready = time.perf_counter()  # preparing the data set is part of the set-up

    bundle, packed = out / "t2.edge", out / "t2.edgepack"
    compressed = edgekit("compress", "t2-gr", "-o", bundle, "--json")
    pack = edgekit("pack", bundle, "-o", packed, "--json")
    export = edgekit("export", bundle, "--to", "onnx", "-o", out / "onnx", "--json")
    for survey in ("ztf", "lsst"):
        edgekit("alerts", "simulate", "--survey", survey, "--count", options.alerts, "-o", out / "packets" / survey)
    # ZTF alerts use the model that was just compressed, LSST alerts use the zoo's.
    runs = {
        "simulated ZTF": edgekit(
            "alerts", "classify", out / "packets" / "ztf", "--model", packed, "-o", out / "ztf.parquet", "--json"
        ),
        "simulated LSST": edgekit("alerts", "classify", out / "packets" / "lsst", "-o", out / "lsst.parquet", "--json"),
    }
    if (REAL / "alerts").is_dir():
        runs["real packets"] = edgekit("alerts", "classify", REAL / "alerts", "-o", out / "real.parquet", "--json")
    console.print("\n[bold]a simulated night through a broker[/bold]")
    night = stream([out / "packets" / "ztf", out / "packets" / "lsst"], out, max(1, 4000 // options.alerts))
    seconds = time.perf_counter() - ready

    kept = [record["pass"] for record in compressed["records"] if record["kept"]]
    quality = [compressed["records"][0]["before"], *[r["after"] for r in compressed["records"] if r["kept"]]]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("t2-gr compressed by", ", ".join(kept) or "nothing: every pass was rolled back")
    table.add_row("log-loss", f"{quality[0]['quality']['value']:.4f} to {quality[-1]['quality']['value']:.4f}")
    table.add_row("packed file", f"{compressed['source_packed_bytes']:,} to {pack['bytes']:,} bytes")
    checks = export["manifest"]["checks"]
    largest, changed = max(check["difference"] for check in checks), sum(check["changed"] for check in checks)
    sizes = ", ".join(map(str, sorted({check["batch"] for check in checks})))
    table.add_row("ONNX export", f"verified at batch {sizes}: largest |dp| {largest:.1e}, {changed} classes changed")
    for name, run in runs.items():
        counts = " + ".join(f"{run[key]:,} {key}" for key in ("classified", "skipped", "corrupt"))
        table.add_row(name, f"{run['in']:,} in = {counts}")
    total, latency = night["ledger"]["total"], night["latency_s"]
    table.add_row(
        "stream",
        f"{night['sent']:,} alerts at {night['rate']:,.0f}/s (asked for: {RATE:,.0f}/s, limit: {night['limited_by']})",
    )
    fates = " + ".join(
        f"{total[name]:,} {name.replace('_', '-')}" for name in ("published", "filtered", "dead_lettered")
    )
    table.add_row("ledger", f"{total['consumed']:,} consumed = {fates}")
    table.add_row("sent to published", f"median {latency['p50']:.2f} s, p99 {latency['p99']:.2f} s; {night['picture']}")
    table.add_row("report and plots", str(bundle / "report.html"))
    table.add_row("results", ", ".join(sorted(str(path) for path in out.glob("*.parquet"))))
    console.print()
    console.print(table)
    console.print(f"\n{seconds:.0f} s after set-up")


if __name__ == "__main__":
    main()
