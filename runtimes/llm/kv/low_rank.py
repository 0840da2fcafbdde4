"""The best approximation of matrices in low rank, as two factors in float16."""

from __future__ import annotations

import torch


def low_rank(rows: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors (heads, rows, rank) and (heads, columns, rank), for each head. The second has the directions of
    the most energy, rounded; the first is the least-squares solution for them."""
    rank = min(rank, *rows.shape[1:])
    right = torch.linalg.eigh(rows.mT @ rows).eigenvectors.flip(-1)[..., :rank].half().contiguous()
    exact = right.double()
    left = torch.linalg.solve(exact.mT @ exact, exact.mT @ rows.mT).mT
    return left.half().contiguous(), right
