"""Round weights such that later weights compensate for the errors of earlier ones (GPTQ, Frantar et al. 2023, arXiv
2210.17323)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Codes = npt.NDArray[Any]


class Grid(Protocol):
    """The values that the weights of a group can take; each row may have its own scale."""

    def codes(self, values: Float64) -> Codes:
        """Return the codes of the nearest values to (rows, n)."""

    def values(self, codes: Codes) -> Float64:
        """Return (rows, n) the values of codes."""


G = TypeVar("G", bound=Grid)


def gptq(
    weight: Float64, factor: Float64, group: int, fit: Callable[[Float64, Float64], G]
) -> tuple[npt.NDArray[np.int16], list[G]]:
    """Return (rows, inputs) codes of a weight (rows, inputs), and the grid of each group of inputs.

    factor: of the inputs, as `inverse_factor` returns it; fit: makes the grid of a group from its weights (rows,
    group), as the errors before it have moved them, and from the cost of an error in each input (group,).

    Rounding input i moves the later inputs' weights by factor[i, i+1:] times its error over factor[i, i] (paper,
    equation 2 and section 3, step 3). Within a group each error moves the group's other weights at once; the weights
    behind the group are moved by one product (section 3, step 2).
    """
    rows, inputs = weight.shape
    left = weight.T.astype(np.float64, order="C")  # one row for each input, which the loop reads and writes
    codes = np.zeros((inputs, rows), np.int16)
    grids = []
    for start in range(0, inputs, group):
        end = min(start + group, inputs)
        grids.append(fit(left[start:end].T, 1 / np.diag(factor)[start:end] ** 2))
        errors = np.empty((end - start, rows))
        for at in range(start, end):
            codes[at] = grids[-1].codes(left[at][:, None])[:, 0]
            rounded = grids[-1].values(codes[at][:, None])[:, 0]
            errors[at - start] = (left[at] - rounded) / factor[at, at]
            left[at + 1 : end] -= np.outer(factor[at, at + 1 : end], errors[at - start])
        left[end:] -= factor[start:end, end:].T @ errors
    return codes.T, grids


def inverse_factor(second: Float64, damping: float) -> Float64:
    """Return the upper Cholesky factor of the inverse of a second moment. second: (inputs, inputs) sum of x x^T over
    the inputs x on calibration data; damping: added to its diagonal, relative to its mean."""
    mean = float(np.mean(np.diag(second))) or 1.0  # all inputs are zero: any rounding is correct
    found: Float64 = np.linalg.cholesky(np.linalg.inv(second + damping * mean * np.eye(len(second)))).T
    return found
