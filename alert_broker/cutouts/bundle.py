"""Make the bundle of a network that classifies cutouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from alert_broker.cutouts.braai import CLASSES, IMAGES, Braai, arguments
from alert_broker.cutouts.placed import Placed
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.bundle.format import PROBABILITIES, Bundle, Manifest, assemble
from edgekit.bundle.tensors import TensorSpec
from edgekit.compression.job import versions
from edgekit.data.dataset import Dataset
from edgekit.nn.training import probabilities

INPUT = "cutouts"
GOLDEN_ROWS, GOLDEN_SEED = 2, 7


def braai_bundle(model: Braai, name: str, norm: str) -> Bundle:
    """Return the bundle of a braai. norm: what the L2 norm of the preprocessing is taken of, "rows" or "image"."""
    tensors = CutoutTensors(model.config.size, cast(Literal["rows", "image"], norm))
    return _bundle_of(model, Manifest(name, "braai", arguments(model.config), (), ()), tensors)


def placed_bundle(model: Placed, given: Mapping[str, Any], name: str, tensors: CutoutTensors, **facts: Any) -> Bundle:
    """Return the bundle of a searched network. given: its constructor arguments; facts: further
    fields of the manifest, such as metrics."""
    return _bundle_of(model, Manifest(name, "placed", dict(given), (), (), **facts), tensors)


def _bundle_of(model: nn.Module, manifest: Manifest, tensors: CutoutTensors) -> Bundle:
    inputs = {INPUT: tensors(synthetic_stamps(GOLDEN_ROWS, tensors.size, GOLDEN_SEED))}
    outputs = {PROBABILITIES: probabilities(model, Dataset(inputs, np.zeros(GOLDEN_ROWS, np.int64)))}
    manifest = replace(
        manifest,
        inputs=(TensorSpec(INPUT, ("batch", *tensors.shape), unit="science, template, difference; each of L2 norm 1"),),
        outputs=(TensorSpec(PROBABILITIES, ("batch", len(CLASSES))),),
        classes=CLASSES,
        class_ids=tuple(range(len(CLASSES))),
        preprocessing=tensors.to_bundle(),
        synthetic=True,
        versions=versions(),
    )
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    return assemble(manifest, state, {}, (inputs, outputs))


def synthetic_stamps(count: int, size: int, seed: int) -> npt.NDArray[np.float32]:
    """Return (count, 3, size, size) images in which every second alert has a source and the others a hot pixel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    images = rng.normal(0.0, 5.0, (count, IMAGES, size, size))
    images[:, :2] += 200.0  # the sky of science and template; a difference has none
    for alert in range(count):
        width, flux = rng.uniform(1.2, 2.5), rng.uniform(200.0, 2000.0)
        source = flux * np.exp(-(x**2 + y**2) / (2 * width**2)) if alert % 2 == 0 else flux * ((x == 0) & (y == 0))
        images[alert, 0] += source
        images[alert, 2] += source
    return images.astype(np.float32)
