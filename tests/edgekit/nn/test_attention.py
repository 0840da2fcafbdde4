"""The compiled attention against softmax attention in float64."""

import math

import numpy as np
import pytest
import torch

from edgekit.nn.attention import TinyHeadAttention


def exact(query, key, value, *, scaled: bool = True):
    """softmax(q k / sqrt(dim)) v of (groups, dim, tokens), float64."""
    query, key, value = (part.double() for part in (query, key, value))
    scores = query.transpose(1, 2) @ key
    if scaled:
        scores = scores / math.sqrt(query.shape[1])
    return (torch.softmax(scores, dim=-1) @ value.transpose(1, 2)).transpose(1, 2)


def triple(groups, dim, tokens, *, size=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(groups, dim, tokens, generator=generator) for _ in range(3)]
    return [(part * factor).requires_grad_() for part, factor in zip(parts, (size, size, 1.0), strict=True)]


def gradients(function, parts, upstream):
    return torch.autograd.grad((function(*parts) * upstream.to(function(*parts).dtype)).sum(), parts)


@pytest.mark.parametrize("dim", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 2, 7, 100, 130])
def test_forward_and_gradients(dim, tokens):
    parts = triple(4, dim, tokens, seed=dim * tokens)
    upstream = torch.randn(4, dim, tokens, generator=torch.Generator().manual_seed(9))
    mixed, expected = TinyHeadAttention.apply(*parts).detach(), exact(*parts).detach()
    assert (mixed - expected).abs().max() < 2e-6 * max(1.0, float(expected.abs().max()))
    got = gradients(TinyHeadAttention.apply, parts, upstream)
    wanted = gradients(exact, parts, upstream)
    for name, first, second in zip(("query", "key", "value"), got, wanted, strict=True):
        assert (first - second).abs().max() < 2e-5 * max(1.0, float(second.abs().max())), name
    if dim > 1 and tokens > 1:  # the planted failure: the scale forgotten
        assert (mixed - exact(*parts, scaled=False)).abs().max() > 1e-3


@pytest.mark.parametrize("scores", [1e2, 1e3, 1e4])
def test_large_scores(scores):
    """Scores of a thousand overflow exp(x) in float32; the row's largest is taken off first."""
    parts = triple(8, 2, 50, size=math.sqrt(scores))
    mixed, expected = TinyHeadAttention.apply(*parts).detach(), exact(*parts).detach()
    assert torch.isfinite(mixed).all()
    # a score of s is known to s * 2**-24 in float32, and the result moves by as much
    tolerance = 1e-6 + 20 * scores * 2**-24
    assert (mixed - expected).abs().max() < tolerance
    upstream = torch.ones_like(mixed)
    for first, second in zip(
        gradients(TinyHeadAttention.apply, parts, upstream), gradients(exact, parts, upstream), strict=True
    ):
        assert torch.isfinite(first).all()
        assert (first - second).abs().max() < 20 * tolerance * max(1.0, float(second.abs().max()))


def test_weights_sum_to_one():
    query, key, _ = triple(3, 2, 40)
    ones = torch.full((3, 2, 40), 7.0)
    assert torch.allclose(TinyHeadAttention.apply(query, key, ones), ones, rtol=1e-6)


def test_gradient_agrees_with_finite_differences():
    parts = triple(1, 2, 5)
    upstream = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(1))
    got = gradients(TinyHeadAttention.apply, parts, upstream)
    for number, gradient in enumerate(got):
        for place in np.ndindex(*gradient.shape):
            loss = []
            for step in (1e-5, -1e-5):
                moved = [part.detach().double().clone() for part in parts]
                moved[number][place] += step
                loss.append(float((exact(*moved) * upstream).sum()))
            assert float(gradient[place]) == pytest.approx((loss[0] - loss[1]) / 2e-5, abs=1e-4)


def test_it_repeats_itself_and_groups_do_not_mix():
    parts = triple(6, 3, 33)
    first = TinyHeadAttention.apply(*parts)
    assert torch.equal(first, TinyHeadAttention.apply(*parts))
    alone = TinyHeadAttention.apply(*(part[2:3].detach().contiguous() for part in parts))
    assert torch.equal(first[2:3], alone)


@pytest.mark.parametrize("broken", range(3))
def test_nan_comes_out_where_it_went_in(broken):
    """It must neither vanish nor raise ZeroDivisionError: the guard and the training loop report it by its name."""
    parts = [part.detach() for part in triple(2, 2, 40)]
    parts[broken][0, 0, 3] = math.nan
    mixed = TinyHeadAttention.apply(*parts)
    assert torch.isnan(mixed[0]).any()
    assert torch.isfinite(mixed[1]).all()
