"""Scores of a network that was not trained. How well they predict the score of a trained one differs between spaces and
data, so a report always shows their correlation with it beside that of parameters and operations."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from edgekit.nn.hiera import build
from edgekit.nn.hiera_config import HieraConfig
from edgekit.nn.hiera_config import arguments as arguments_of

SIZES = ("parameters", "macs", "capacity")  # that need no network
PROXIES = (*SIZES, "jacobian", "synflow")
IMAGES = 32  # of the batch for `jacobian`


def sizes(parameters: int, macs: int) -> dict[str, float]:
    """Return the SIZES. capacity: the geometric mean of parameters and multiply-accumulates, so that under a limit of
    time neither is had at the price of the other: wide last stages are many parameters and few operations, and the
    first stages the other way round."""
    return {"parameters": float(parameters), "macs": float(macs), "capacity": math.sqrt(parameters * macs)}


def jacobian(config: HieraConfig, images: torch.Tensor, seed: int) -> float:
    """Return how differently a new network answers to different images: -sum(log(v + k) + 1 / (v + k)) over the
    eigenvalues v of the correlations between the gradients of the images' summed logits (Abdelfattah et al. 2021,
    "Zero-Cost Proxies for Lightweight NAS", arXiv 2101.08134, section 3.2; "jacob_cov"). Higher is better."""
    model = _new(config, seed)
    images = images.detach().clone().requires_grad_(True)
    model(images).sum().backward()
    assert images.grad is not None
    rows = images.grad.reshape(len(images), -1).double().numpy()
    rows = rows - rows.mean(axis=1, keepdims=True)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
    values = np.clip(np.linalg.eigvalsh(rows @ rows.T), 0, None) + 1e-5
    return float(-(np.log(values) + 1 / values).sum())


def synflow(config: HieraConfig, seed: int) -> float:
    """Return log of the sum of |weight x gradient| for the summed logits of an image of ones, with the absolute value
    of each weight (Tanaka et al. 2020, "SynFlow", arXiv 2006.05467, equation 2). Higher is better."""
    model = _new(config, seed).double()
    with torch.no_grad():
        for value in model.parameters():
            value.abs_()
    image = torch.ones(1, config.channels, config.image, config.image, dtype=torch.float64)
    model(image).sum().backward()
    total = 0.0
    for value in model.parameters():
        if value.grad is not None:
            total += float((value.detach() * value.grad).abs().sum())
    return float(np.log(max(total, 1e-300)))


def _new(config: HieraConfig, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(**arguments_of(config)).eval()
