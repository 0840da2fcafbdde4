"""Self-attention for many tiny heads, compiled for the CPU, with its gradient.

t2 has 16 heads of 2 numbers each. At that size the (tokens, tokens) scores take almost all the time. A kernel that
keeps one row of them in cache makes a training step 2.3 times faster than torch's fused attention or plain matmuls
(tools/bench_training.py). It computes exact softmax attention in float32; the gradients follow Dao et al. 2022
(FlashAttention, appendix B.4): the backward pass recomputes the scores from the row's log-sum.

The kernels are serial on purpose: numba's OpenMP layer would change torch's own thread count in the same process.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor

Float = npt.NDArray[np.float32]
LOG2_E = np.float32(1.0 / math.log(2.0))
# 2**-60 vanishes next to the row's largest term, 1; lower powers would give denormals, which are slow.
LOWEST_POWER = np.float32(-60.0)


class TinyHeadAttention(torch.autograd.Function):
    """softmax(q k / sqrt(dim)) v for query, key and value of shape (groups, dim, tokens), float32, contiguous, on the
    CPU; a group is one head of one sample. Tokens are last so that every inner loop is one vector operation."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mixed = torch.empty_like(query)
        log_sum = query.new_empty(query.shape[0], query.shape[2])
        scale = np.float32(query.shape[1] ** -0.5)
        _forward(*_arrays(query, key, value, mixed, log_sum), scale)
        ctx.save_for_backward(query, key, value, mixed, log_sum)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, mixed, log_sum = ctx.saved_tensors
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        scale = np.float32(query.shape[1] ** -0.5)
        _backward(*_arrays(query, key, value, mixed, log_sum, gradients[0].contiguous(), *results), scale)
        return results


def _arrays(*tensors: Tensor) -> list[Float]:
    return [tensor.detach().numpy() for tensor in tensors]


@njit(inline="always", fastmath=True, error_model="numpy")
def _exp2(x: np.float32) -> np.float32:
    """2**x for x <= 0 to 1e-7 relative: a polynomial on [-0.5, 0.5] and an exponent built from bits, both of which
    LLVM vectorises (it does not vectorise libm's)."""
    x = max(x, LOWEST_POWER)
    whole = np.floor(x + np.float32(0.5))
    f = x - whole
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always", fastmath=True, error_model="numpy")
def _scores(row: Float, query: Float, key: Float, group: int, i: int) -> None:
    """row[j] = query_i . key_j, unscaled: scores reach thousands, where scaling first would round differently"""
    _, dim, tokens = query.shape
    q = query[group, 0, i]
    for j in range(tokens):
        row[j] = q * key[group, 0, j]
    for d in range(1, dim):
        q = query[group, d, i]
        for j in range(tokens):
            row[j] += q * key[group, d, j]


@njit(fastmath=True, nogil=True, cache=True, error_model="numpy")
def _forward(query: Float, key: Float, value: Float, mixed: Float, log_sum: Float, scale: np.float32) -> None:
    groups, dim, tokens = query.shape
    row, power = np.empty(tokens, np.float32), scale * LOG2_E
    for group in range(groups):
        for i in range(tokens):
            _scores(row, query, key, group, i)
            top = row[0]
            for j in range(tokens):
                top = max(top, row[j])
            total = np.float32(0)
            for j in range(tokens):
                row[j] = _exp2((row[j] - top) * power)
                total += row[j]
            for d in range(dim):
                weighted = np.float32(0)
                for j in range(tokens):
                    weighted += row[j] * value[group, d, j]
                mixed[group, d, i] = weighted / total
            log_sum[group, i] = top * power + np.float32(math.log2(total))


@njit(fastmath=True, nogil=True, cache=True, error_model="numpy")
def _backward(
    query: Float,
    key: Float,
    value: Float,
    mixed: Float,
    log_sum: Float,
    gradient: Float,
    query_gradient: Float,
    key_gradient: Float,
    value_gradient: Float,
    scale: np.float32,
) -> None:
    groups, dim, tokens = query.shape
    row, power = np.empty(tokens, np.float32), scale * LOG2_E
    row_gradient = np.empty(tokens, np.float32)
    key_gradient[:] = 0
    value_gradient[:] = 0
    for group in range(groups):
        for i in range(tokens):
            _scores(row, query, key, group, i)
            _scores(row_gradient, gradient, value, group, i)
            delta = np.float32(0)
            for d in range(dim):
                delta += gradient[group, d, i] * mixed[group, d, i]
            for j in range(tokens):
                row[j] = _exp2(row[j] * power - log_sum[group, i])
                row_gradient[j] = (row_gradient[j] - delta) * row[j] * scale
            for d in range(dim):
                g, q, weighted = gradient[group, d, i], query[group, d, i], np.float32(0)
                for j in range(tokens):
                    value_gradient[group, d, j] += g * row[j]
                    key_gradient[group, d, j] += q * row_gradient[j]
                    weighted += row_gradient[j] * key[group, d, j]
                query_gradient[group, d, i] = weighted
