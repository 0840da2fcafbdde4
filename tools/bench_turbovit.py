"""Time the network that `edgekit search` found in TurboViT's envelope beside published ones, in turns, in one run.

    edgekit search run --preset turbovit-this-cpu -o envelope
    python tools/bench_turbovit.py envelope --peers FOLDER --graphs FOLDER --json turbovit.json

Every network is exported with random weights at two opsets, and the one that ONNX Runtime runs faster counts, with all
its graph optimizations. Batch 1 and 16, 224x224 colour images, one thread by CPU time and two threads by wall time.
`others` is the number of processors that other programs kept busy meanwhile, `share` the part of wall time that the
calls on one thread had: if it is below 0.9, the run was disturbed, and its wall times mean little.

Random weights say nothing of quality: no accuracy on ImageNet was measured, of TurboViT there are no weights to compare
with, and the found network has no more than its size beside the published ones.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from peer_networks import FULL, full, macs, use
from torch import nn

from edgekit import machine
from edgekit.bundle.files import write_file
from edgekit.cost.profiled import open_model
from edgekit.cost.timing import in_turns, timed
from edgekit.nas.latency import BUSY
from edgekit.nas.space import key_of
from edgekit.nn import hiera
from edgekit.nn.hiera_config import HieraConfig, arguments, published

IMAGE, CLASSES = 224, 1000
OPSETS = (17, 23)  # 17 by torch's tracer, 23, which has Attention and Gelu, by its dynamo exporter
TWICE, THRICE = "FasterViT-0", "MobileViTv2-2.0"  # the paper's two, and how much faster than them is asked for
SAME_SIZE = "Hiera of TurboViT's size"
TOLERANCE = 1e-3  # of the largest output
PAPER = {TWICE: 3.21}  # times FasterViT-0's latency, on another machine, a GPU


def found_networks(folder: Path) -> tuple[dict[str, HieraConfig], dict[str, Any]]:
    """Return the best finalist of the search and of its random control, and what the report says of the study."""
    values = json.loads((folder / "report.json").read_bytes())
    networks: dict[str, HieraConfig] = {}
    for row in values["finalists"]:  # the best first
        label = "random control's best" if row["arm"] == "random" else "found"
        if not values["measured"][row["key"]]["breaks"]:
            networks.setdefault(label, HieraConfig(**row["arguments"]))
    if "found" not in networks:
        raise SystemExit(f"{folder}: no finalist of the search keeps its limits when it is measured")
    return networks, {name: values[name] for name in ("study", "score", "limits", "trials", "clock")}


def networks_of(found: Mapping[str, HieraConfig]) -> dict[str, nn.Module]:
    """Return every network in evaluation mode; published ones without what only training needs."""
    own = {**found, SAME_SIZE: published((1, 2, 7, 2), width=64, heads=1)}
    models = {name: hiera.build(fused=True, **arguments(config)).eval() for name, config in own.items()}
    return models | {name: full(name) for name in (*FULL, TWICE)}


def graph(model: nn.Module, opset: int) -> onnx.ModelProto:
    """Export a network for any number of images."""
    example, file = torch.randn(2, 3, IMAGE, IMAGE), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        common: dict[str, Any] = {"opset_version": opset, "input_names": ["image"], "output_names": ["logits"]}
        if opset < 18:
            torch.onnx.export(model, (example,), file, dynamo=False, dynamic_axes={"image": {0: "batch"}}, **common)
        else:
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
                **common,
            )
            assert program is not None
            return program.model_proto
    return onnx.load_from_string(file.getvalue())


def graphs_of(name: str, model: nn.Module, folder: Path, opsets: Sequence[int]) -> dict[int, Path]:
    """Return the graphs of a network that ONNX Runtime opens and that give torch's outputs, by opset. Those that the
    folder holds are not exported again, so that a quiet machine is needed for the times alone."""
    images = np.random.default_rng(0).standard_normal((2, 3, IMAGE, IMAGE), np.float32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(images)).numpy()
    found: dict[int, Path] = {}
    for opset in opsets:
        path = folder / f"{name.replace(' ', '-')}-{opset}.onnx"
        refused = path.with_suffix(".txt")
        if not path.is_file() and not refused.is_file():
            try:
                made = graph(model, opset)
                (given,) = open_model(made).run(None, {"image": images})
                gap = float(abs(given - wanted).max() / abs(wanted).max())
                if not gap <= TOLERANCE:
                    raise ValueError(f"its outputs differ from torch's by {gap:.2g} of the largest")
                write_file(path, made.SerializeToString())  # whole or not at all
            except Exception as error:  # those of torch and onnxruntime share no base class
                refused.write_text(str(error).splitlines()[0][:200])
        if path.is_file():
            found[opset] = path
        print(f"{name}: opset {opset}: {'ready' if path.is_file() else refused.read_text()}", flush=True)
    if not found:
        raise SystemExit(f"{name}: no graph runs in ONNX Runtime")
    return found


def measured(
    graphs: Mapping[str, onnx.ModelProto], batch: int, threads: int, seconds: float, least: int
) -> dict[str, dict[str, float]]:
    """Return milliseconds for each image, of calls in turns: CPU time on one thread, wall time on more."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    images = np.random.default_rng(batch).standard_normal((batch, 3, IMAGE, IMAGE), np.float32)
    calls = [
        timed(functools.partial(open_model(item, threads).run, None, {"image": images}), clock, time.perf_counter)
        for item in graphs.values()
    ]
    taken = in_turns(calls, seconds=seconds * len(calls), least=least)
    rows = {}
    for place, name in enumerate(graphs):
        times = 1e3 * taken[:, place, 0] / batch
        low, middle, high = np.percentile(times, [5, 50, 95])
        share = taken[:, place, 0].sum() / taken[:, place, 1].sum()
        rows[name] = {"p5": low, "p50": middle, "p95": high, "rounds": len(times), "share": share}
    return {name: {key: round(float(value), 3) for key, value in row.items()} for name, row in rows.items()}


def busy_seconds() -> float:
    """Return the seconds that all processors were busy since the system began (Linux)."""
    user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def bars(times: Mapping[str, float]) -> dict[str, Any]:
    """Return what was asked for at batch 1, and whether it is so. times: milliseconds by network."""
    own = times["found"]
    peers = {name: value for name, value in times.items() if name not in ("found", "random control's best")}
    fastest = min(peers, key=lambda name: peers[name])
    return {
        "fastest peer": fastest, "times the fastest peer": round(peers[fastest] / own, 3),
        "times FasterViT-0": round(times[TWICE] / own, 3), "times MobileViTv2-2.0": round(times[THRICE] / own, 3),
        "faster than all": own < peers[fastest], "2x FasterViT-0": times[TWICE] >= 2 * own,
        "3x MobileViTv2-2.0": times[THRICE] >= 3 * own,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("study", type=Path, help="the folder of a finished search, such as --preset turbovit-this-cpu")
    parser.add_argument("--peers", type=Path, required=True, help="the folder that timm and fastervit are in")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--graphs", type=Path, required=True, help="folder of exported graphs, which are kept")
    parser.add_argument("--export-only", action="store_true", help="export and verify; nothing is timed")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 16))
    parser.add_argument("--seconds", type=float, default=2.0, help="of calls for each network, batch and thread count")
    parser.add_argument("--rounds", type=int, default=9, help="at least")
    options = parser.parse_args()
    torch.manual_seed(0)
    versions = use(options.peers)
    found, study = found_networks(options.study)
    options.graphs.mkdir(parents=True, exist_ok=True)
    networks: dict[str, dict[str, Any]] = {}
    paths: dict[str, dict[int, Path]] = {}
    for name, model in networks_of(found).items():
        networks[name] = {
            "parameters": sum(item.numel() for item in model.parameters()), "macs": macs(model, (3, IMAGE, IMAGE)),
        }  # fmt: skip
        if name in found:
            networks[name] |= {"key": key_of(found[name]), "arguments": arguments(found[name])}
        label = networks[name].get("key", name)
        paths[name] = graphs_of(label, model, options.graphs, OPSETS)
    if options.export_only:
        return
    graphs = {}
    for name, versions_of in paths.items():
        made = {str(opset): onnx.load(path) for opset, path in versions_of.items()}
        times = measured(made, 1, 1, options.seconds / 4, 5)
        best = min(times, key=lambda opset: times[opset]["p50"])
        networks[name] |= {"opset": int(best), "by_opset": {opset: row["p50"] for opset, row in times.items()}}
        graphs[name] = made[best]
        print(f"{name:26} {networks[name]['by_opset']}", flush=True)
    rows, verdicts = [], {}
    for batch, threads in itertools.product(options.batch, (1, 2)):
        before = busy_seconds(), time.process_time(), time.perf_counter()
        times = measured(graphs, batch, threads, options.seconds, options.rounds)
        busy, own, taken = (
            after - start
            for after, start in zip((busy_seconds(), time.process_time(), time.perf_counter()), before, strict=True)
        )
        others = round(max(0.0, busy - own) / taken, 2)
        print(f"batch {batch} threads {threads}: other programs kept {others} processors busy", flush=True)
        middle = {name: row["p50"] for name, row in times.items()}
        rows.append({"batch": batch, "threads": threads, "others": others, "milliseconds per image": times})
        if batch == 1:
            verdicts[f"{threads} threads"] = bars(middle)
        for name in sorted(times, key=lambda name: middle[name]):
            size = networks[name]
            print(
                f"batch {batch:2} threads {threads} {name:26} {size['parameters'] / 1e6:6.2f} M "
                f"{size['macs'] / 1e9:5.2f} G {times[name]}", flush=True,
            )  # fmt: skip
    lowest = min(
        row["share"] for item in rows if item["threads"] == 1 for row in item["milliseconds per image"].values()
    )
    content = {
        "machine": machine.describe(), "onnxruntime": onnxruntime.__version__, "torch": torch.__version__, **versions,
        "study": study, "networks": networks, "times": rows, "bars": verdicts, "paper": PAPER,
        "disturbed": lowest < BUSY,
    }  # fmt: skip
    print(json.dumps(verdicts, indent=1))
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
