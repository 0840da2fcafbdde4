"""Check how well the cost model predicts this machine: print the rank correlation and the relative error of the table
of measured operators, and of the bare roofline, against the measured CPU time of graphs that the model has not seen.

    python tools/check_cost_model.py --json benchmarks/cost_model.json    # two minutes on one core
    python tools/check_cost_model.py --quick

Measured: ONNX Runtime on one thread, all graphs in turns, the median CPU time of a call. Predicted: the sum over the
operators that ONNX Runtime runs for the graph, from a table that is fitted to graphs of one operator each
(edgekit/cost/samples.py); none of the graphs here is among them. Bare roofline: the longer of operations / rate and
bytes / bandwidth of the machine, for each operator of the exported graph.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import machine
from edgekit.bundle.onnx_file import load
from edgekit.compression.bench import float_graph
from edgekit.compression.job import versions
from edgekit.cost.measured import measure, samples, second_run
from edgekit.cost.operators import measured_rates, work
from edgekit.cost.profiled import optimized_work
from edgekit.cost.timing import in_turns
from edgekit.graph.shapes import sized
from edgekit.importers.files import resolve

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))


def mlp(width: int, depth: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def conv_net(channels: int, depth: int, norm: bool = True) -> nn.Module:
    """Build a network of 3 x 3 convolutions; every second one halves the size."""
    layers: list[nn.Module] = []
    before = 3
    for number in range(depth):
        layers.append(nn.Conv2d(before, channels, 3, padding=1, stride=1 + number % 2))
        layers += [nn.BatchNorm2d(channels)] if norm else []
        layers.append(nn.ReLU())
        before = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(F.relu(self.one(x))))


class Inverted(nn.Module):
    """A block of MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 1)."""

    def __init__(self, channels: int, expand: int) -> None:
        super().__init__()
        inner = channels * expand
        self.layers = nn.Sequential(
            nn.Conv2d(channels, inner, 1),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner),
            nn.ReLU6(),
            nn.Conv2d(inner, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def stem(channels: int, *blocks: nn.Module) -> nn.Module:
    first = nn.Conv2d(3, channels, 3, padding=1, stride=2)
    return nn.Sequential(first, nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class UNet(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.last = nn.Conv2d(2 * channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.down1(x))
        second = F.relu(self.down2(F.max_pool2d(first, 2)))
        return self.last(torch.cat([first, self.up(second)], dim=1))


class Encoder(nn.Module):
    """A pre-norm transformer over a sequence of vectors."""

    def __init__(self, dim: int, heads: int, inner: int, depth: int) -> None:
        super().__init__()
        from deit import Attention

        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * depth))
        self.inner = nn.ModuleList(nn.Linear(dim, inner) for _ in range(depth))
        self.outer = nn.ModuleList(nn.Linear(inner, dim) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for number, attention in enumerate(self.attention):
            x = x + attention(self.norms[2 * number](x))
            x = x + self.outer[number](F.gelu(self.inner[number](self.norms[2 * number + 1](x))))
        return x.mean(1)


class Mixer(nn.Module):
    """Products over tokens and over channels in turns (Tolstikhin et al. 2021, arXiv 2105.01601)."""

    def __init__(self, tokens: int, dim: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(nn.Linear(tokens, tokens) for _ in range(depth))
        self.channels = nn.ModuleList(nn.Linear(dim, dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            x = x + F.gelu(tokens(self.norm(x).transpose(1, 2))).transpose(1, 2)
            x = x + torch.tanh(channels(x))
        return x.mean(1)


def exported(network: nn.Module, *shape: int) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(2, *shape),),
            buffer,
            dynamo=False,
            opset_version=17,  # type: ignore[arg-type]
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )
    return load(buffer.getvalue(), "exported")


def graphs(quick: bool) -> list[tuple[str, onnx.ModelProto, int]]:
    """Return the name, the graph and the batch size of each case."""
    from deit import VisionTransformer

    torch.manual_seed(0)
    found: list[tuple[str, onnx.ModelProto, int]] = []
    for name in ("t2-gr", "t2-ugrizy"):
        model = float_graph(resolve(name))
        found += [(name, model, batch) for batch in (1, 4, 24)]
    networks: list[tuple[str, nn.Module, tuple[int, ...], Sequence[int]]] = [
        ("mlp 48x3", mlp(48, 3), (48,), (1, 128)),
        ("mlp 300x4", mlp(300, 4), (300,), (1, 50)),
        ("mlp 1500x2 tanh", mlp(1500, 2, nn.Tanh), (1500,), (1, 20)),
        ("mlp 120x8 gelu", mlp(120, 8, nn.GELU), (120,), (16, 600)),
        ("conv 24x4", conv_net(24, 4), (3, 48, 48), (1, 8)),
        ("conv 80x6", conv_net(80, 6, norm=False), (3, 40, 40), (1,)),
        ("residual 40x3", stem(40, *(Residual(40) for _ in range(3))), (3, 36, 36), (1, 6)),
        ("inverted 24x4", stem(24, *(Inverted(24, 4) for _ in range(4))), (3, 64, 64), (1, 4)),
        ("inverted 96x2", stem(96, *(Inverted(96, 2) for _ in range(2))), (3, 20, 20), (2,)),
        ("u-net 12", UNet(12), (3, 48, 48), (1, 4)),
        ("u-net 40", UNet(40), (3, 32, 32), (1,)),
        ("encoder 48", Encoder(48, 3, 96, 2), (60, 48), (1, 16)),
        ("encoder 96", Encoder(96, 6, 384, 3), (40, 96), (1, 8)),
        ("encoder 256", Encoder(256, 4, 512, 2), (128, 256), (1,)),
        ("encoder 20", Encoder(20, 5, 40, 4), (150, 20), (1, 10)),
        ("mixer 49x96", Mixer(49, 96, 3), (49, 96), (1, 12)),
        ("deit 96 wide, 6 deep", VisionTransformer(96, 16, 96, 6, 3, 100), (3, 96, 96), (1, 4)),
        ("deit 192 wide, 3 deep", VisionTransformer(128, 16, 192, 3, 3, 1000), (3, 128, 128), (1, 2)),
    ]
    if not quick:
        networks.append(("deit-tiny", VisionTransformer(224, 16, 192, 12, 3, 1000), (3, 224, 224), (1,)))
    for name, network, shape, batches in networks:
        model = exported(network, *shape)
        found += [(name, model, batch) for batch in batches]
    return found


def measured(chosen: Sequence[tuple[str, onnx.ModelProto, int]], rounds: int) -> Any:
    """Return the median CPU seconds of a call of each graph, all graphs in turns."""
    calls = [second_run(model, batch) for _, model, batch in chosen]
    return np.median(in_turns(calls, least=rounds, most=rounds, warmup=1)[:, :, 0], axis=0)


def quality(predicted: Any, truth: Any) -> dict[str, float]:
    """Return Spearman's rank correlation, and the median and the ninth decile of the relative error."""
    error = np.abs(predicted / truth - 1)
    spearman = float(spearmanr(predicted, truth).statistic)
    return {"spearman": spearman, "median_error": float(np.median(error)), "p90_error": float(np.quantile(error, 0.9))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer calls, without the largest network")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    facts = {**machine.describe(), "commit": commit}
    print(*(f"{key} {value}" for key, value in {**facts, **versions()}.items()), sep=", ")
    table = measure(samples(), facts=facts, runtime=versions()["onnxruntime"], seconds=0.02 if options.quick else 0.1)
    print(f"table: {sum(table.samples.values())} measurements of {len(table.weights)} families")
    rates = measured_rates()
    chosen = graphs(options.quick)
    truth = measured(chosen, 9 if options.quick else 31)
    corrected, bare = [], []
    for _, model, batch in chosen:
        corrected.append(table.total(optimized_work(model, batch)))
        operators = work(model, sized(model, batch)).operators
        bare.append(sum(max(item.operations / rates.flops, item.bytes / rates.bytes) for item in operators))
    results = {"corrected": quality(np.array(corrected), truth), "roofline": quality(np.array(bare), truth)}
    print(f"\n{'graph':26s} {'batch':>5s} {'measured ms':>12s} {'predicted':>10s} {'roofline':>10s}")
    rows = []
    for (name, _, batch), real, ours, least in zip(chosen, truth, corrected, bare, strict=True):
        print(f"{name:26s} {batch:5d} {real * 1e3:12.3f} {ours * 1e3:10.3f} {least * 1e3:10.3f}")
        rows.append({"graph": name, "batch": batch, "measured": real, "predicted": ours, "roofline": least})
    print(f"\n{len(chosen)} graphs, none of them in the calibration set")
    for name, found in results.items():
        print(
            f"{name:10s} rank correlation {found['spearman']:.3f}, relative error: median {found['median_error']:.1%}, "
            f"ninth decile {found['p90_error']:.1%}"
        )
    if options.json:
        content = {
            "machine": facts,
            "versions": versions(),
            "quick": options.quick,
            "graphs": len(chosen),
            "rates": {"flops": rates.flops, "bytes": rates.bytes},
            "results": results,
            "rows": rows,
            "table": {name: {"samples": table.samples[name], "error": table.error[name]} for name in table.weights},
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
