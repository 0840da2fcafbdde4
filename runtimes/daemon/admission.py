"""Whether a model's memory fits: weights, cache and workspace against what the machine has, before anything is loaded.

The sum is an upper estimate. `tests/runtimes/daemon/test_admission.py` compares it with the memory that a loaded model
takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from edgekit.bundle.bounded import parse_size
from edgekit.bundle.format import Bundle
from edgekit.importers.gguf import Tensor
from edgekit.machine import memory_bytes
from runtimes.daemon.refusal import RefusedError
from runtimes.llm.architecture import Architecture, Layer, Model

Q8_0 = 34 / 32  # bytes of a value
# bytes of a value in the cache; policies of the torch engine store float32 for a while, whatever they code it to
CACHES = {"f16": 2.0, "int8": 1.25, "int4": 0.75, "q8_0": Q8_0, "q4_0": 18 / 32}
FIXED = 64 << 20  # bytes for a tokenizer and its tables, or for a runtime's own
MARGIN = 1.1  # for the allocators


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes that a model needs."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        parts = ((self.weights, "weights"), (self.cache, "cache"), (self.workspace, "workspace"))
        return " + ".join(f"{value / 1e6:,.0f} MB of {name}" for value, name in parts if value) + (
            f" = {self.total / 1e6:,.0f} MB"
        )


def of_language(model: Model, *, engine: str, kv: str, context: int, rows: int, folder: bool) -> Needs:
    """Return what a language model needs. rows: tokens of a step; folder: whether transformers saved it."""
    of = model.architecture
    weights = sum(_stored(tensor, engine, folder) for tensor in _tensors(model))
    width = CACHES.get(kv or "f16", 4.0) if engine != "torch" else 4.0
    cache = 2 * of.layers * of.kv_heads * of.head_size * context * width
    return Needs(int(weights * MARGIN), int(cache * MARGIN), _workspace(of, rows) + FIXED)


def of_bundle(bundle: Bundle, rows: int) -> Needs:
    """Return what a bundle needs: a runtime keeps a copy of the weights beside its own form of them. The workspace is
    estimated from what goes in and comes out; it is not known before the model runs."""
    weights = sum(value.nbytes for value in bundle.weights().values())
    specs = (*bundle.manifest.inputs, *bundle.manifest.outputs)
    row = sum(4 * math.prod(axis if isinstance(axis, int) else 64 for axis in spec.shape[1:]) for spec in specs)
    return Needs(int(2 * weights * MARGIN), 0, 16 * row * rows + FIXED)


def _tensors(model: Model) -> Iterator[Tensor]:
    yield model.embedding
    if model.head is not model.embedding:
        yield model.head
    for layer in model.layers:
        for name in Layer.__dataclass_fields__:
            if (tensor := getattr(layer, name)) is not None:
                yield tensor


def _stored(tensor: Tensor, engine: str, folder: bool) -> float:
    """Return the bytes that an engine stores a tensor in."""
    values = math.prod(tensor.shape)
    if engine == "torch":
        return 4.0 * values
    if engine == "native" and folder and len(tensor.shape) > 1:
        return Q8_0 * values
    return float(tensor.content.nbytes)


def _workspace(of: Architecture, rows: int) -> int:
    """Return the bytes of the activations and logits of a step, in float32."""
    heads = of.heads * of.head_size + 2 * of.kv_heads * of.head_size
    return 4 * rows * (of.vocabulary + 3 * of.hidden + 4 * of.width + 2 * heads)


class Admission:
    """The memory of all models. limit: a size such as "4GB" for all models together, or ""; memory: returns (total,
    free) bytes of the machine."""

    def __init__(self, limit: str = "", memory: Callable[[], tuple[int, int]] = memory_bytes) -> None:
        self._limit = parse_size(limit, "server.memory") if limit else None
        self._memory = memory

    def missing(self, needs: Needs, taken: int) -> int:
        """Return how many bytes are missing for a model beside those that are loaded; 0 if it fits. taken: bytes of the
        loaded ones."""
        _, free = self._memory()
        rooms = [free] if free else []
        rooms += [self._limit - taken] if self._limit is not None else []
        return max(0, needs.total - min(rooms)) if rooms else 0

    def refusal(self, name: str, needs: Needs, taken: int) -> RefusedError:
        """Return why a model is not loaded: 503 if it fits once others have ended, else 507."""
        total, free = self._memory()
        least = min(filter(None, (total, self._limit)), default=0)
        have = f"{free / 1e6:,.0f} MB are free on this machine"
        if self._limit is not None:
            have += f", and {max(0, self._limit - taken) / 1e6:,.0f} MB are left of server.memory"
        message = f"the model {name!r} needs {needs}; {have}"
        if needs.total <= min(least, free + taken):
            return RefusedError(503, f"{message}; other models are in use, try again later", retry_after=10)
        return RefusedError(507, f"{message}; take a shorter context, another kv or a smaller model")
