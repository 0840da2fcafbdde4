"""Round weights to float16, so that their bytes compress better."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from edgekit.passes.base import Candidate, Change, Context, Pass, matrices


@dataclass(frozen=True, slots=True)
class RoundToHalf(Pass[Candidate]):
    """include: shell-style patterns of the weights to round."""

    name: ClassVar[str] = "round_to_half"
    summary: ClassVar[str] = "round weights to the nearest float16"

    include: tuple[str, ...] = ("*",)

    def plan(self, candidate: Candidate) -> list[Change]:
        return [Change(name, "float32", "rounded to float16") for name in matrices(candidate.model, self.include)]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        model = candidate.copy_model()
        with torch.no_grad():
            for name in matrices(model, self.include):
                weight = model.get_parameter(name)
                weight.copy_(weight.half().float())
        return Candidate(candidate.family, candidate.arguments, model)
