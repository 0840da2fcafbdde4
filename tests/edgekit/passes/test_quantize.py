"""The grid: against numpy, and what rounding must not do."""

import numpy as np
import pytest
import torch

from edgekit.passes.magnitude_prune import MagnitudePrune
from edgekit.passes.quantize import CLIPS, FakeQuantize, Quantize, best_scale, rounded


def numpy_error(weight, scale, bits):
    """(rows,) squared rounding error, computed in float64 without torch."""
    limit = 2 ** (bits - 1) - 1
    codes = np.clip(np.round(weight.astype(np.float64) / scale), -limit, limit)
    return ((codes * scale - weight) ** 2).sum(axis=1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_inside_the_grid_move_by_half_a_step_at_most(bits):
    weight = torch.from_numpy(np.random.default_rng(bits).normal(size=(20, 30)).astype(np.float32))
    scale = best_scale(weight, bits)
    assert scale.shape == (20, 1)
    inside = weight.abs() <= scale * (2 ** (bits - 1) - 0.5)
    moved = (rounded(weight, scale, bits) * scale - weight).abs()
    assert (moved <= scale / 2 * (1 + 1e-5))[inside].all()
    assert inside.float().mean() > (0.5 if bits == 2 else 0.9)
    truncated = torch.trunc(weight / scale) * scale  # the planted failure: rounding towards zero
    assert ((truncated - weight).abs() > scale / 2)[inside].any()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_scale_has_the_least_error_of_those_tried(bits):
    weight = np.random.default_rng(1).standard_t(3, (8, 64)).astype(np.float32)
    chosen = numpy_error(weight, best_scale(torch.from_numpy(weight), bits).numpy(), bits)
    largest = np.abs(weight).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
    tried = np.stack([numpy_error(weight, largest * clip, bits) for clip in CLIPS])
    assert chosen == pytest.approx(tried.min(axis=0), rel=1e-3)
    if bits == 3:
        assert (chosen < tried[-1] * 0.99).any(), "no row is better off clipped, so clipping is not tested"


def test_rows_of_zeros_and_of_one_value():
    weight = torch.tensor([[0.0, 0.0], [3.0, 3.0], [-1e-20, 1e-20]])
    scale = best_scale(weight, 4)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    restored = rounded(weight, scale, 4) * scale
    assert restored[0].tolist() == [0.0, 0.0]
    assert restored[1].tolist() == pytest.approx([3.0, 3.0])


def test_gradients_pass_through_the_rounding():
    weight = torch.tensor([[0.11, -0.52, 0.0]], requires_grad=True)
    grid = FakeQuantize(weight.detach(), 4)
    (grid(weight) * torch.tensor([[2.0, 3.0, 5.0]])).sum().backward()
    assert weight.grad.tolist() == [[2.0, 3.0, 0.0]]  # the third is a pruned weight and stays where it is


def test_zeros_survive_quantizing_and_its_training(tiny_candidate, tiny_context):
    pruned = MagnitudePrune(sparsity=0.6, epochs=1).apply(tiny_candidate, tiny_context)
    quantized = Quantize(bits=8, epochs=4, learning_rate=1e-2).apply(pruned, tiny_context)
    for name in quantized.encodings:
        assert not quantized.weights()[name][pruned.weights()[name] == 0].any(), name
    free = Quantize(bits=8, epochs=4, learning_rate=1e-2).apply(tiny_candidate, tiny_context)
    assert all(np.mean(free.weights()[name] == 0) < 0.2 for name in free.encodings)


def test_the_plan_and_what_happened(tiny_candidate, tiny_context):
    compression = Quantize(bits=5, epochs=1)
    plan = compression.plan(tiny_candidate)
    after = compression.apply(tiny_candidate, tiny_context)
    assert [change.tensor for change in plan] == list(after.encodings)
    for change in plan:
        encoding = after.encodings[change.tensor]
        assert change.before == f"{encoding.codes.size} x 32 bit"
        assert change.after == f"{encoding.codes.size} x 5 bit + {encoding.scale.size} scales"
        assert np.abs(encoding.codes.astype(int)).max() <= 15


def test_eight_bits_cost_next_to_nothing_and_two_bits_a_lot(tiny_candidate, tiny_context, tiny_data):
    from edgekit.nn.training import probabilities

    original = probabilities(tiny_candidate.model, tiny_data[1])
    moved = {}
    for bits in (8, 2):
        after = Quantize(bits=bits, epochs=0).apply(tiny_candidate, tiny_context)
        moved[bits] = np.abs(probabilities(after.model, tiny_data[1]) - original).max()
    assert moved[8] < 0.1 < moved[2]
