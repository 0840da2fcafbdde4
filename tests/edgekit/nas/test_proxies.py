"""Proxies against their formulas, written down naively."""

import numpy as np
import pytest
import torch

from edgekit.nas import proxies
from edgekit.nn import hiera
from edgekit.nn.hiera_config import HieraConfig, arguments

CONFIG = HieraConfig((1, 1), ("rep", "global"), (1, 2), (True,), 8, 4, 2, "conv3x2", image=16, channels=1, classes=3)


def network(seed):
    torch.manual_seed(seed)
    return hiera.build(**arguments(CONFIG)).eval()


def test_jacobian_is_its_formula():
    images = torch.randn(6, 1, 16, 16)
    rows = []
    for image in images:  # one at a time, where the proxy takes them together
        one = image[None].clone().requires_grad_(True)
        network(3)(one).sum().backward()
        rows.append(one.grad.flatten().double().numpy())
    values = np.linalg.eigvalsh(np.corrcoef(rows))
    expected = -sum(np.log(value + 1e-5) + 1 / (value + 1e-5) for value in values)
    assert proxies.jacobian(CONFIG, images, 3) == pytest.approx(expected, rel=1e-3)
    assert proxies.jacobian(CONFIG, images, 3) != proxies.jacobian(CONFIG, images, 4)


def test_equal_images_have_the_worst_jacobian():
    images = torch.randn(6, 1, 16, 16)
    assert proxies.jacobian(CONFIG, images[:1].repeat(6, 1, 1, 1), 3) < proxies.jacobian(CONFIG, images, 3)


def test_synflow_is_its_formula():
    model = network(3).double()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(value.abs())
    image = torch.ones(1, 1, 16, 16, dtype=torch.float64)
    total = 0.0
    for name, value in model.named_parameters():  # by finite differences along each tensor, weight x gradient summed
        with torch.no_grad():
            before = value.clone()
            value.mul_(1 + 1e-5)
            high = float(model(image).sum())
            value.copy_(before * (1 - 1e-5))
            low = float(model(image).sum())
            value.copy_(before)
        slope = (high - low) / 2e-5
        gradient = torch.autograd.grad(model(image).sum(), value)[0]
        assert float((before * gradient).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-6), name
        total += float((before * gradient).abs().sum())
    assert proxies.synflow(CONFIG, 3) == pytest.approx(np.log(total))
