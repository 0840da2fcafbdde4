"""Scale the inputs of matrices such that those with large activations lose less in rounding (AWQ, Lin et al. 2024,
arXiv 2306.00978, section 3.2).

A matrix gets its columns times s and its inputs divided by s, which changes nothing before rounding. The division is
folded into what makes the inputs: a norm's weight, or the rows of the matrix before. s is a power of each input's root
mean square (the paper takes the mean magnitude), and the power is the one with the least error of the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from edgekit.importers.gguf_encode import nearest
from edgekit.importers.gguf_formats import FORMATS, NUMBERS, Floats
from runtimes.llm.architecture import Architecture
from runtimes.llm.compression.forward import INPUTS, Moments

POWERS = tuple(number / 10 for number in range(11))  # 0 leaves the matrix as it is
ROWS = 256  # outputs of a matrix on which a power is tried
# what makes the inputs of each group of matrices: the parts of the layer that are divided by s. The groups whose inputs
# are a norm's come first: their powers are chosen before a division gives the rows of `value` and `up` other sizes.
SOURCES = {
    "query": ("attention_norm",),
    "gate": ("mlp_norm",),
    "attention_output": ("value", "value_bias"),
    "down": ("up",),
}
Weights = dict[str, Floats]


def scaled(weights: Weights, moments: Moments, form: str, of: Architecture) -> tuple[Weights, Moments]:
    """Return the weights of a layer by role, scaled and folded for a format, and the moments of the scaled inputs."""
    weights, moments = dict(weights), dict(moments)
    for group, sources in SOURCES.items():
        matrices = [weights[role] for role in INPUTS[group]]
        repeats = of.queries_per_key if group == "attention_output" else 1
        per_source = _best(matrices, moments[group], form, repeats, of.head_size)
        scale = _repeated(per_source, repeats, of.head_size)
        for role in INPUTS[group]:
            weights[role] = weights[role] * scale
        for role in sources:
            if role in weights:
                divided = weights[role].T / per_source  # of a matrix, the last axis of its transpose are the rows
                weights[role] = np.ascontiguousarray(divided.T)
        inverse = torch.from_numpy(1 / scale.astype(np.float64))
        moments[group] = moments[group] * inverse * inverse[:, None]
    return weights, moments


def _best(matrices: Sequence[Floats], second: torch.Tensor, form: str, repeats: int, head: int) -> Floats:
    """Return the scale of each channel of the source with the least error of the outputs."""
    sample = [matrix[:: max(1, len(matrix) // ROWS)] for matrix in matrices]
    power = second.diagonal().numpy().reshape(-1, repeats, head).mean(1).reshape(-1)  # heads that share their values
    size = np.sqrt(np.maximum(power, 1e-8 * power.mean() or 1.0))  # an input that is always 0 may have any scale
    low = second.float()
    loss, best = np.inf, np.ones(len(size), np.float32)
    for exponent in POWERS:
        scale = size**exponent
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        inputs = _repeated(scale, repeats, head)
        error = sum(_error(matrix, inputs, low, form) for matrix in sample)
        if error < loss:
            loss, best = error, scale
    return best


def _repeated(scale: Floats, repeats: int, head: int) -> Floats:
    """Return the scale of each input from that of each channel of the source: heads of queries share their values."""
    return scale if repeats == 1 else scale.reshape(-1, 1, head).repeat(repeats, axis=1).reshape(-1)


def _error(matrix: Floats, scale: Floats, second: torch.Tensor, form: str) -> float:
    """Return the sum of squared errors of the outputs."""
    stored = FORMATS[NUMBERS[form]].decode(nearest(form, matrix * scale))
    error = torch.from_numpy(stored / scale - matrix)
    return float(((error @ second) * error).sum())
