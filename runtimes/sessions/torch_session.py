"""PyTorch, the reference for all other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays, TensorSpec, golden_inputs
from edgekit.errors import EdgekitError
from edgekit.graph.network import Network
from edgekit.session import check_inputs


class TorchSession:
    """A bundle in PyTorch, float32, eager mode, on the given device."""

    provider = "torch"

    def __init__(
        self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None, chunk: int | None = None
    ) -> None:
        for name, value in (("threads", threads), ("chunk", chunk)):
            if value is not None and value < 1:
                raise EdgekitError(f"torch: {name} = {value}; expected at least 1, or nothing for torch's own choice")
        try:
            self._device = torch.device(device)
            self._network = Network(bundle).eval().to(self._device)
        except (RuntimeError, AssertionError) as error:  # torch raises an AssertionError if it was built without CUDA
            found = ["cpu"] + [f"cuda:{number}" for number in range(torch.cuda.device_count())]
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise EdgekitError(
                f"torch {torch.__version__} has no device {device!r} ({reason}); it has {', '.join(found)}"
            ) from None
        self.inputs: tuple[TensorSpec, ...] = bundle.manifest.inputs
        self.outputs: tuple[TensorSpec, ...] = bundle.manifest.outputs
        self._chunk = chunk  # rows at a time; None for all of them
        self._threads = threads or torch.get_num_threads()
        cpu = f"cpu ({self._threads} thread{'s' * (self._threads > 1)})"
        self.device = cpu if self._device.type == "cpu" else str(self._device)

    def run(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Return the outputs by name, in the order of the inputs' rows."""
        rows = check_inputs(self.inputs, arrays)
        tensors = [torch.from_numpy(np.ascontiguousarray(arrays[spec.name])).to(self._device) for spec in self.inputs]
        others = torch.get_num_threads()  # the number of threads belongs to the process, so it is restored afterwards
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                parts = zip(*(tensor.split(self._chunk or max(rows, 1)) for tensor in tensors), strict=True)
                outputs = [torch.cat(pieces) for pieces in zip(*(self._network(*part) for part in parts), strict=True)]
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = {name: array.shape for name, array in arrays.items()}
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise EdgekitError(f"torch cannot run this model on inputs of shapes {shapes}: {reason}") from error
        finally:
            torch.set_num_threads(others)
        return {spec.name: output.cpu().numpy() for spec, output in zip(self.outputs, outputs, strict=True)}

    def warmup(self, batch: int) -> None:
        """Run once at this batch size, so that no later run pays for one-time work."""
        self.run(golden_inputs(self.inputs, batch))
