"""Remove the residual blocks with the least effect on the loss, then recover (Men et al. 2024, "ShortGPT", arXiv
2403.03853, section 3.2). Here a block's influence is the loss of the network without it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.errors import EdgekitError, unknown
from edgekit.nn.module import ranges, remove
from edgekit.nn.training import tensors
from edgekit.nn.units import results
from edgekit.passes.base import Candidate, Change, Context, Pass, at_least, example_inputs, loss, recover

SAMPLES, BATCH = 256, 64  # for the loss without a block: the differences between blocks are large


@dataclass(frozen=True, slots=True)
class RemoveLayers(Pass[Candidate]):
    """`count`: how many blocks to remove; `blocks`: the ModuleList or Sequential that holds them, required if the
    network has several."""

    name: ClassVar[str] = "remove_layers"
    summary: ClassVar[str] = "remove the residual blocks with the least effect on the loss, then recover"
    epochs_parameter: ClassVar[str] = "epochs"

    count: int
    blocks: str = ""
    epochs: int = 8
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        at_least("count", self.count, 1, 1000)
        at_least("epochs", self.epochs, 0, 10_000)
        at_least("learning_rate", self.learning_rate, 1e-7, 1.0)

    def plan(self, candidate: Candidate) -> list[Change]:
        path, able = self._stack(candidate)
        blocks = len(list(candidate.model.get_submodule(path).children()))
        each = sum(value.numel() for value in candidate.model.get_submodule(f"{path}.{able[0]}").parameters())
        return [
            Change(
                path,
                f"{blocks} blocks",
                f"{self.count} of blocks {ranges(able)} removed, about {each:,} parameters each",
            ),
        ]

    def apply(self, candidate: Candidate, context: Context) -> Candidate:
        path, able = self._stack(candidate)
        chosen = sorted(sensitivity(candidate.model, path, able, context), key=lambda item: item[1])[: self.count]
        step = {"removed": ranges(index for index, _ in chosen), "blocks": path}
        model = remove(candidate.copy_model(), [step])
        _check(model, candidate, path)
        pruned = [*candidate.arguments.get("pruned", ()), step]
        model = recover(model, context, self.epochs, self.learning_rate, self.name)
        return Candidate(candidate.family, {**candidate.arguments, "pruned": pruned}, model)

    def _stack(self, candidate: Candidate) -> tuple[str, list[int]]:
        """Return the container of blocks, and the blocks whose inputs and outputs have the same shape."""
        if candidate.family != "module":
            raise EdgekitError(
                f"a {candidate.family} is no model built by a Python function; use distill with fewer layers instead"
            )
        found = {path: able for path, able in stacks(candidate).items() if len(able) > 1}
        if not found:
            raise EdgekitError("no ModuleList or Sequential holds two blocks that keep their input's shape")
        if self.blocks and self.blocks not in found:
            raise unknown("container of blocks", self.blocks, found, where="blocks")
        if not self.blocks and len(found) > 1:
            raise EdgekitError(f"several containers hold blocks: {', '.join(found)}; name one: blocks = ...")
        path = self.blocks or next(iter(found))
        if self.count >= len(found[path]):
            raise EdgekitError(f"count = {self.count}; {path} has {len(found[path])} such blocks, one must stay")
        return path, found[path]


def sensitivity(model: nn.Module, path: str, able: list[int], context: Context) -> list[tuple[int, float]]:
    """Return (block, mean loss on training rows if the block returns its input) for each block."""
    rows = np.random.default_rng(context.seed).permutation(len(context.train))[:SAMPLES]
    batches = [context.train.take(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    stack: Any = model.get_submodule(path)
    found = []
    with torch.no_grad():
        whole = [results(model, tensors(batch))[0] for batch in batches]
        for index in able:
            hook = stack[index].register_forward_hook(lambda block, inputs, output: inputs[0])
            try:
                losses = [
                    len(batch) * loss(results(model, tensors(batch))[0], batch.labels, context.train.labels, original)
                    for batch, original in zip(batches, whole, strict=True)
                ]
            finally:
                hook.remove()
            found.append((index, float(sum(losses)) / len(rows)))
    return found


def stacks(candidate: Candidate) -> dict[str, list[int]]:
    """Return the containers, each with the items that keep their input's shape and have the most common class among
    these."""
    model = candidate.copy_model()
    calls: dict[nn.Module, list[bool]] = {}

    def note(block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        both = bool(inputs) and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
        calls.setdefault(block, []).append(both and inputs[0].shape == output.shape)

    holders = {path: item for path, item in model.named_modules() if isinstance(item, (nn.ModuleList, nn.Sequential))}
    for stack in holders.values():
        for block in stack:
            block.register_forward_hook(note)
    with torch.no_grad():
        results(model, example_inputs(candidate))
    found = {}
    for path, stack in holders.items():
        able = [index for index, block in enumerate(stack) if calls.get(block) == [True] and list(block.parameters())]
        classes = Counter(type(stack[index]) for index in able)
        found[path] = [index for index in able if type(stack[index]) is classes.most_common(1)[0][0]]
    return found


def _check(model: nn.Module, candidate: Candidate, path: str) -> None:
    """Raise unless the shorter network gives outputs of the same shapes."""
    example = example_inputs(candidate)
    with torch.no_grad():
        before = [value.shape for value in results(candidate.copy_model(), example)]
        try:
            after = [value.shape for value in results(model, example)]
        except Exception as error:  # the network's own code may raise anything
            raise EdgekitError(
                f"the network does not run with fewer {path} ({str(error)[:120]}); its code expects "
                "a fixed number of them"
            ) from error
    if before != after:
        raise EdgekitError(f"with fewer {path} the network's outputs have other shapes; leave {path} as it is")
