"""What is to be compressed, and by which measure."""

from __future__ import annotations

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
    """What to compress and by which measure."""

    source: Bundle
    recipe: Sequence[Step]
    train: Dataset
    test: Dataset
    limits: Limits = field(default_factory=Limits)
    metric: str = "log-loss"
    runtime: str = "onnxruntime"  # the one that latency is measured on
    seed: int = 0
    target: Target | None = None  # the device it is for; None: this machine, and nothing is decided beforehand
    agree: tuple[str, ...] = ()  # other runtimes on which the result must be as good, at every batch size
    replay: bool = False  # measure, but keep every pass that does not fail: what an earlier run has judged

    def key(self) -> str:
        """Identity of the work but for the recipe: what a pass leaves depends on this and on the passes before it."""
        data = hashlib.sha256()
        for part in (self.train, self.test):
            data.update(part.labels.tobytes())
            for array in part.inputs.values():
                data.update(array.tobytes())
        settings = [self.source.digest, data.hexdigest(), asdict(self.limits), self.metric, self.runtime, self.seed]
        settings += [self.agree, self.replay, metrics.source(self.metric)]
        settings += [asdict(self.target)] if self.target else []
        surroundings = [versions(), machine.describe()]
        return hashlib.sha256(json.dumps([*settings, *surroundings]).encode()).hexdigest()

    def on_target(self) -> Job:
        """The job with what its target decides about the recipe; an error if a pass is not for that target."""
        if self.target is None:
            return self
        from edgekit.compression.decisions import fitted

        return replace(self, recipe=fitted(self.target, self.recipe))

    @property
    def estimated(self) -> bool:
        """Whether latency is estimated, because the target is not here."""
        if self.target is None:
            return False
        from edgekit.compression.decisions import measured_here

        return not measured_here(self.target)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {"python": platform.python_version()}
    tools = ("onnxruntime", "openvino", "onnx", "onnxscript", "torch-pruning", "torchao")
    for name in ("edgekit", "torch", "numpy", *tools):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
