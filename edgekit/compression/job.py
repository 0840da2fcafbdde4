"""The job of a compression: what to compress, and by which measure."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

from edgekit import machine
from edgekit.bundle.format import Bundle
from edgekit.compression import metrics
from edgekit.compression.guard import Limits
from edgekit.compression.recipe import Step
from edgekit.data.dataset import Dataset
from edgekit.targets.profile import Target

Notify = Callable[[str], None]
ShowProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Job:
    """A model, the data, the limits and the recipe of a compression."""

    source: Bundle
    recipe: Sequence[Step]
    train: Dataset
    test: Dataset
    limits: Limits = field(default_factory=Limits)
    metric: str = "log-loss"
    runtime: str = "onnxruntime"  # latency is measured on it
    seed: int = 0
    target: Target | None = None  # the device; None: this machine, and no device decides about passes
    agree: tuple[str, ...] = ()  # other runtimes on which the result must be as good, at every batch size
    replay: bool = False  # measure, but keep every pass that does not fail, because an earlier run has judged it

    def key(self) -> str:
        """Return the identity of the job without the recipe. The state after a pass depends on this key and on the
        passes up to it."""
        data = hashlib.sha256()
        for part in (self.train, self.test):
            for array in (part.labels, *part.inputs.values()):
                data.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
        settings = [self.source.digest, data.hexdigest(), asdict(self.limits), self.metric, self.runtime, self.seed]
        settings += [self.agree, self.replay, metrics.source(self.metric)]
        settings += [asdict(self.target)] if self.target else []
        surroundings = [versions(), machine.describe()]
        return hashlib.sha256(json.dumps([*settings, *surroundings]).encode()).hexdigest()

    def on_target(self) -> Job:
        """Return the job with the decisions of its target about the recipe. Raises if a pass is not for that target."""
        if self.target is None:
            return self
        from edgekit.compression.decisions import fitted

        return replace(self, recipe=fitted(self.target, self.recipe))

    @property
    def estimated(self) -> bool:
        """Return whether latency is estimated, because the target is not this machine."""
        if self.target is None:
            return False
        from edgekit.compression.decisions import measured_here

        return not measured_here(self.target)


def versions() -> dict[str, str]:
    """Return the versions on which a result depends."""
    return dict(_versions())


@functools.cache
def _versions() -> dict[str, str]:
    """Read them once per process, because a process loads each package once and a search asks in every trial."""
    found = {"python": platform.python_version()}
    tools = ("onnxruntime", "openvino", "onnx", "onnxscript", "torch-pruning", "torchao")
    for name in ("edgekit", "torch", "numpy", *tools):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
