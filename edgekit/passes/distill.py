"""Train a smaller network of the same family on the labels and on the original's probabilities (Hinton et al. 2015,
arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.bundle.family import build
from edgekit.errors import EdgekitError, unknown
from edgekit.nn.training import tensors
from edgekit.nn.units import results
from edgekit.passes.base import Candidate, Change, Context, Pass, at_least, recover

STARTS = ("random", "original")


@dataclass(frozen=True, slots=True)
class Distill(Pass[Candidate]):
    """`student` overrides constructor arguments of the family, or of the Python function that builds the network:
    {embed_dim = 16, heads = 4, head_dim = 4}. `start`: "random", or "original" for a student whose weights begin as the
    original's of the same name where the shapes agree (Sanh et al. 2019, arXiv 1910.01108, section 3), which needs
    fewer epochs if most layers are kept."""

    name: ClassVar[str] = "distill"
    summary: ClassVar[str] = "train a smaller network to give the same probabilities"
    epochs_parameter: ClassVar[str] = "epochs"

    student: Mapping[str, Any]
    epochs: int = 40
    learning_rate: float = 3e-3
    start: str = "random"

    def __post_init__(self) -> None:
        if not isinstance(self.student, Mapping) or not self.student:
            raise EdgekitError(f"student = {self.student!r}; expected a table such as {{embed_dim = 16, heads = 4}}")
        if self.start not in STARTS:
            raise unknown("start", self.start, STARTS)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def plan(self, candidate: Candidate) -> list[Change]:
        before = sum(value.numel() for value in candidate.model.parameters())
        student = build(candidate.family, self._arguments(candidate))
        after = sum(value.numel() for value in student.parameters())
        copied = len(_common(candidate.model, student)) if self.start == "original" else 0
        origin = f", {copied} tensors copied" if copied else ""
        return [Change("all", f"{before} parameters", f"{after} parameters{origin}, trained for {self.epochs} epochs")]

    def _arguments(self, candidate: Candidate) -> dict[str, Any]:
        """Return the student's arguments. They do not inherit units pruned from the model: the student is unpruned."""
        if candidate.family != "module":
            return {**candidate.arguments, **self.student}
        own = {**candidate.arguments.get("arguments", {}), **self.student}
        return {**{key: value for key, value in candidate.arguments.items() if key != "pruned"}, "arguments": own}

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        arguments = self._arguments(candidate)
        torch.manual_seed(context.seed)
        student = build(candidate.family, arguments)
        if context.teacher is None:
            raise EdgekitError(
                "distill: the model came as a graph and has no network to learn from; leave this pass out"
            )
        row = tensors(context.train.take(np.arange(1)))
        try:
            fits = [value.shape for value in results(student, row)] == [
                value.shape for value in results(context.teacher, row)
            ]
        except RuntimeError:
            fits = False
        if not fits:
            raise EdgekitError(
                f"student = {dict(self.student)}: such a {candidate.family} has other inputs or outputs than the "
                "model; change its width and depth only"
            )
        if self.start == "original":
            student.load_state_dict(_common(candidate.model, student), strict=False)
        model = recover(student, context, self.epochs, self.learning_rate, self.name)
        return Candidate(candidate.family, arguments, model)


def _common(model: nn.Module, student: nn.Module) -> dict[str, Tensor]:
    """Return the model's weights that the student has with the same name and shape."""
    shapes = {name: value.shape for name, value in student.state_dict().items()}
    return {name: value for name, value in model.state_dict().items() if shapes.get(name) == value.shape}
