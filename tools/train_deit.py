"""Train DeiT-tiny for minutes on a task that needs no download, so that the accuracy of a compressed DeiT-tiny can be
judged.

    python tools/train_deit.py work/             # writes deit-tiny.safetensors and its log; minutes on two cores

The task is synthetic: gratings of ten classes (five directions, two wavelengths), 224 x 224, whose phase, contrast,
colours and, within a few per cent, direction and wavelength are random, under noise that is stronger than the gratings.
The task shows how much accuracy compression costs a trained vision transformer. It says nothing about photographs.

During most of the training, the network sees a sixth of the patches, which are drawn anew for each batch (PatchDropout,
Liu et al. 2022, arXiv 2208.07220). This makes a step much cheaper. At the end it sees whole images, as in use.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import deit

from edgekit import machine
from edgekit.compression.job import versions
from edgekit.data.dataset import Dataset
from edgekit.nn.training import Schedule, fit, probabilities

SIDE, CLASSES, DIRECTIONS = 224, 10, 5
WAVELENGTHS = (9.0, 15.0)  # pixels; a patch has 16
NOISE = 1.0  # standard deviation; the amplitude of a grating is 0.25 to 1
TRAIN, TEST, SEED = 1024, 512, 0
PART_SEEN = 1 / 6  # share of the patches
PART = Schedule(epochs=6, batch=64, learning_rate=1e-3, averaging=0.98)
WHOLE = Schedule(epochs=1, batch=32, learning_rate=1e-4, averaging=0.9)
LAST = 256  # rows that the network sees whole: they cost four times as much


def gratings(samples: int, seed: int) -> Dataset:
    """Images (samples, 3, 224, 224) and their classes: direction + 5 x wavelength."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, samples)
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    images = np.empty((samples, 3, SIDE, SIDE), np.float32)
    for row, label in enumerate(labels):
        angle = np.pi * (label % DIRECTIONS + rng.uniform(-0.2, 0.2)) / DIRECTIONS
        length = WAVELENGTHS[label // DIRECTIONS] * rng.uniform(0.92, 1.08)
        wave = np.sin(2 * np.pi / length * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
        colour = rng.normal(0, 1, (3, 1, 1)).astype(np.float32)
        colour *= rng.uniform(0.25, 1.0) / np.linalg.norm(colour)
        images[row] = wave.astype(np.float32) * colour + NOISE * rng.standard_normal((3, SIDE, SIDE), np.float32)
    return Dataset({"image": images}, labels.astype(np.int64))


class PatchDropout(nn.Module):
    """A network that sees some of the patches while it trains, and all of them otherwise."""

    def __init__(self, network: deit.VisionTransformer, keep: float) -> None:
        super().__init__()
        self.network, self.keep = network, keep

    def forward(self, image: Tensor) -> Tensor:
        net = self.network
        if not self.training:
            return net(image)
        x = net.patch_embed(image).flatten(2).transpose(1, 2) + net.pos_embed[:, 1:]
        x = x[:, torch.randperm(x.shape[1])[: round(self.keep * x.shape[1])]]
        first = (net.cls_token + net.pos_embed[:, :1]).expand(len(x), -1, -1)
        return net.head(net.norm(net.blocks(torch.cat([first, x], dim=1)))[:, 0])


def arguments() -> dict[str, int]:
    """Return the arguments of deit.build."""
    return {"classes": CLASSES}


def trained(folder: Path, test: Dataset) -> tuple[Path, dict[str, object]]:
    """Return the weights and the training log. The network is trained unless an earlier run left its weights in the
    folder."""
    weights, log = folder / "deit-tiny.safetensors", folder / "deit-tiny.json"
    if weights.is_file() and log.is_file():
        return weights, json.loads(log.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    started, spent = time.perf_counter(), time.process_time()

    def tell(done: int, total: int, loss: float) -> None:
        print(f"  epoch {done} of {total}: loss {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    data = gratings(TRAIN, SEED + 1)
    network = deit.build(**arguments())
    half = fit(PatchDropout(network, PART_SEEN), data, PART, seed=SEED, progress=tell)
    network = fit(half.network, data.take(np.arange(LAST)), WHOLE, seed=SEED + 1, progress=tell)
    accuracy = float((probabilities(network, test, batch=64).argmax(axis=1) == test.labels).mean())
    facts: dict[str, object] = {
        "task": "gratings, 10 classes",
        "train": TRAIN,
        "test": len(test),
        "seed": SEED,
        "accuracy": accuracy,
        "epochs": [PART.epochs, WHOLE.epochs],
        "seconds": round(time.perf_counter() - started),
        "cpu_seconds": round(time.process_time() - spent),
        "machine": machine.describe(),
        "versions": versions(),
    }
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    log.write_text(json.dumps(facts, indent=1))
    return weights, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    weights, facts = trained(options.folder, gratings(TEST, SEED + 2))
    assert load_file(weights)
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
