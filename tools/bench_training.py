"""Time one training step of t2 with three attentions, in turns in one run: compiled, torch's fused, plain matmuls.

python tools/bench_training.py [--json benchmarks/training.json]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit import machine
from edgekit.compression.job import versions
from edgekit.cost.timing import Timed, in_turns, timed
from edgekit.nn import t2

ROUNDS, BATCH = 12, 32


def fused(self: t2.SelfAttention, x: Tensor) -> Tensor:
    """Run the same layer on torch's scaled_dot_product_attention."""
    batch, tokens, _ = x.shape
    split = (batch, tokens, self.heads, self.head_dim)
    q, k, v = (layer(x).reshape(split).transpose(1, 2) for layer in (self.query, self.key, self.value))
    mixed = F.scaled_dot_product_attention(q, k, v)
    return self.combine(mixed.transpose(1, 2).reshape(batch, tokens, -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = t2.build(bands=2)
    inputs, labels = torch.randn(BATCH, 100, 2), torch.randint(0, 14, (BATCH,))
    ours, fits = t2.SelfAttention.forward, t2._compiled_attention_fits

    def step(forward: Callable[[t2.SelfAttention, Tensor], Tensor], compiled: bool) -> Timed:
        once = timed(lambda: F.cross_entropy(model(inputs), labels).backward(), time.process_time)

        def call() -> tuple[float, ...]:
            t2.SelfAttention.forward = forward  # type: ignore[method-assign]
            t2._compiled_attention_fits = fits if compiled else lambda x: False
            model.zero_grad()
            return once()

        return call

    steps = {"compiled": step(ours, True), "torch fused": step(fused, False), "plain matmuls": step(ours, False)}
    taken = in_turns(list(steps.values()), least=ROUNDS, most=ROUNDS)[:, :, 0] * 1e3
    milliseconds = dict(zip(steps, np.median(taken, axis=0).tolist(), strict=True))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    result = {
        "machine": machine.describe(),
        "versions": versions(),
        "commit": commit,
        "batch": BATCH,
        "step_cpu_ms": milliseconds,
    }
    print(json.dumps(result, indent=1))
    for name, value in milliseconds.items():
        print(f"{name:14} {value:7.1f} ms, {value / milliseconds['compiled']:.2f} times the compiled one")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
