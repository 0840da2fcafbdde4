"""Read the published t2 weight sets: named float32 arrays in Keras layout, where kernels are (in, out)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

from edgekit.errors import EdgekitError
from edgekit.nn.t2 import T2, T2Config

_BLOCK = "blocks.0."
# Our parameter -> the published array; kernels are transposed.
NAMES = {
    "embed": "conv_embedding",
    _BLOCK + "attention.query": "att.query",
    _BLOCK + "attention.key": "att.key",
    _BLOCK + "attention.value": "att.value",
    _BLOCK + "attention.combine": "att.combine",
    _BLOCK + "expand": "ffn.0",
    _BLOCK + "contract": "ffn.1",
    "classifier": "classifier",
}
NORMS = {_BLOCK + "norm1": "ln1", _BLOCK + "norm2": "ln2"}


def from_published(arrays: Mapping[str, npt.NDArray[np.float32]], *, context: int, source: str = "weights") -> T2:
    """Return a t2 with published weights. The arrays do not show the number of heads: every published model has 16
    heads of 2."""
    needed = [f"{name}.{part}" for name in NAMES.values() for part in ("kernel", "bias")]
    needed += [f"{name}.{part}" for name in NORMS.values() for part in ("gamma", "beta")]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise EdgekitError(
            f"{source}: not a published t2 weight set, no array {missing[0]!r} (and {len(missing) - 1} more); "
            "expected an .npz of named arrays in Keras layout such as 'att.query.kernel'"
        )
    for name in needed:
        if (got := arrays[name]).dtype.kind != "f" or got.ndim < (2 if name.endswith("kernel") else 1):
            raise EdgekitError(
                f"{source}: array {name!r} has shape {got.shape} and dtype {got.dtype}; expected floats in Keras "
                "layout, kernels as (in, out)"
            )
        if not np.isfinite(arrays[name]).all():
            raise EdgekitError(f"{source}: array {name!r} holds NaN or infinite values; the file cannot be used")
    bands, embed_dim = arrays["conv_embedding.kernel"].shape[-2:]
    attention = arrays["att.query.kernel"].shape[-1]
    config = T2Config(
        bands=bands,
        classes=len(arrays["classifier.bias"]),
        context=context,
        embed_dim=embed_dim,
        heads=attention // 2,
        head_dim=2,
        ff_dim=len(arrays["ffn.0.bias"]),
    )
    state = {f"{ours}.bias": arrays[f"{theirs}.bias"] for ours, theirs in NAMES.items()}
    state |= {f"{ours}.weight": _kernel(arrays[f"{theirs}.kernel"], source) for ours, theirs in NAMES.items()}
    state |= {f"{ours}.weight": arrays[f"{theirs}.gamma"] for ours, theirs in NORMS.items()}
    state |= {f"{ours}.bias": arrays[f"{theirs}.beta"] for ours, theirs in NORMS.items()}
    model = T2(config)
    try:
        model.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()})
    except RuntimeError as error:
        raise EdgekitError(f"{source}: {str(error).splitlines()[-1].strip()}") from None
    return model.eval()


def _kernel(array: npt.NDArray[np.float32], source: str) -> npt.NDArray[np.float32]:
    """Convert Keras (1, in, out) or (in, out) to PyTorch (out, in)."""
    if array.size != array.shape[-2] * array.shape[-1]:
        raise EdgekitError(f"{source}: a kernel has shape {array.shape}; every published t2 kernel is (in, out)")
    return array.reshape(array.shape[-2:]).T
