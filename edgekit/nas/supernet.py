"""A supernet: one set of weights for all networks of a space, of which each network inherits a part. Its scores are
cheap and often wrong, so a study uses them only if they agree with those of networks that were trained alone.

Weights are entangled as in AutoFormer (Chen et al. 2021, arXiv 2107.00651, section 3.1): blocks of one kind at one
place share a tensor, and a narrower block has its first rows and columns. Kinds of blocks and stems have weights of
their own. Each step of training takes one random network (Guo et al. 2020, "Single Path One-Shot", arXiv 1904.00420).
Batch normalizations keep no statistics for all networks: those of a network are computed when it is judged.

In a study of 24 small Hieras (3 to 30 epochs of 7,000 images), an undertrained supernet turned the order of networks
around: it favours small ones, whose weights are trained most often.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgekit.data.dataset import Dataset
from edgekit.nas.ranks import spearman
from edgekit.nas.space import Space
from edgekit.nas.spec import FEWEST_CHECKED
from edgekit.nn.hiera import Hiera
from edgekit.nn.hiera_config import ATTENTIONS, HieraConfig
from edgekit.nn.training import Schedule, accuracy, fit, tensors

LEAST_AGREEMENT = 0.5  # Spearman's correlation with stand-alone training
NETWORKS = 256  # of which training takes one at each step
STATISTICS = 512  # training rows from which a network's batch normalizations get their statistics


@dataclass(frozen=True, slots=True)
class Gate:
    """Whether a supernet may judge networks. correlation: of its scores with those of stand-alone training, over the
    checked networks; NaN if one side has no order."""

    correlation: float
    networks: int

    @property
    def accepted(self) -> bool:
        return self.networks >= FEWEST_CHECKED and self.correlation >= LEAST_AGREEMENT

    def __str__(self) -> str:
        known = "have no order" if math.isnan(self.correlation) else f"correlate by {self.correlation:.2f}"
        told = f"the supernet's scores of {self.networks} networks and those of stand-alone training {known} (Spearman)"
        if self.accepted:
            return f"{told}: the supernet judged the networks of the first rung"
        return (
            f"{told}, and {LEAST_AGREEMENT} is the least: the supernet was refused, and each network was trained "
            "alone; train the supernet for more epochs, or leave it out"
        )


def gate(alone: Sequence[float], inherited: Sequence[float]) -> Gate:
    """Compare the scores of the same networks."""
    return Gate(spearman(alone, inherited), len(alone))


class Supernet(nn.Module):
    """In training, images (batch, channels, side, side) to logits of a random one of `networks`."""

    def __init__(self, space: Space, networks: Sequence[HieraConfig], seed: int) -> None:
        super().__init__()
        self.networks = tuple(networks)
        self.shared = nn.ParameterDict()
        for config in _largest(space):
            names = {name: _shared_name(config, name) for name, _ in _skeleton(config).named_parameters()}
            if set(names.values()) <= set(self.shared):
                continue
            torch.manual_seed(seed)
            for name, value in Hiera(config).named_parameters():
                if names[name] not in self.shared:
                    self.shared[names[name]] = nn.Parameter(_by_part(name, value.detach()))

    def forward(self, image: Tensor) -> Tensor:
        number = int(torch.randint(len(self.networks), ())) if self.training else 0
        config = self.networks[number]
        model = _skeleton(config)
        state = inherit(dict(self.shared.items()), config)
        for name, value in model.named_buffers():  # of batch normalizations; training does not read them
            fill = torch.ones if name.endswith("running_var") else torch.zeros
            state[name] = fill(value.shape, dtype=value.dtype)
        logits: Tensor = functional_call(model.train(self.training), state, (image,))
        return logits


def inherit(shared: Mapping[str, Tensor], config: HieraConfig) -> dict[str, Tensor]:
    """Return the parameters of a network, by its own names: parts of the shared tensors."""
    found = {}
    for name, value in _skeleton(config).named_parameters():
        whole = shared[_shared_name(config, name)]
        shape = _by_part(name, value).shape
        found[name] = whole[tuple(slice(size) for size in shape)].reshape(value.shape)
    return found


def inherited_score(shared: Mapping[str, Tensor], config: HieraConfig, training: Dataset, judging: Dataset) -> float:
    """Return the share of the judging rows that a network with inherited weights gets right."""
    model = Hiera(config)
    model.load_state_dict(inherit(shared, config), strict=False)  # all but the statistics
    normalizations = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in normalizations:
        module.reset_running_stats()
        module.momentum = None  # the mean over all batches
    if normalizations:
        model.train()
        with torch.no_grad():
            model(*tensors(training.take(np.arange(min(STATISTICS, len(training))))))
    return accuracy(model.eval(), judging)


def trained(
    space: Space, networks: Sequence[HieraConfig], training: Dataset, schedule: Schedule, seed: int, checkpoint: Path,
    progress: Callable[[str, int, int], None],
) -> dict[str, Tensor]:  # fmt: skip
    """Train a supernet, on one thread, and return the shared tensors. The same arguments give the same bytes, also if
    an earlier call was killed: it continues from the checkpoint, which has its last finished epoch."""

    def show(done: int, total: int, loss: float) -> None:
        progress("training the supernet", done, total)

    model = Supernet(space, networks, seed)
    found = fit(model, training, schedule, seed=seed, progress=show, checkpoint=checkpoint)
    assert isinstance(found, Supernet)
    return {name: value.detach() for name, value in found.shared.items()}


def _largest(space: Space) -> Iterator[HieraConfig]:
    """Yield networks with the largest values of the space that have, together, every kind of block at every place.
    Neither the width of heads nor the mask unit changes a weight's shape."""
    stages = range(len(space.depths))
    width, most = max(space.width), max(map(len, space.kinds))
    for stem, pools, first, turn in itertools.product(
        space.stem, itertools.product(*space.pools), range(len(space.depths) + 1), range(most)
    ):
        choices = [[k for k in space.kinds[n] if (k in ATTENTIONS) == (n >= first)] for n in stages]
        side = space.image // 4 >> sum(pools[:first])
        if all(choices) and side and space.image % (4 << sum(pools)) == 0:
            kinds = tuple(options[turn % len(options)] for options in choices)
            yield HieraConfig(
                tuple(map(max, space.depths)), kinds, tuple(map(max, space.ratios)), pools, width, width, side, stem,
                space.image, space.channels, space.classes,
            )  # fmt: skip


@functools.lru_cache(2 * NETWORKS)
def _skeleton(config: HieraConfig) -> Hiera:
    """Return the network without memory for its weights."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return Hiera(config)


def _shared_name(config: HieraConfig, name: str) -> str:
    """Return the name of the tensor that a network's parameter is a part of: the kind and place of its block."""
    parts = name.split(".")
    first = config.first_attention
    if parts[0] == "stem":
        place = f"stem {config.stem}"
    elif parts[0] == "positions":
        place = f"positions {first} {config.sides[first]}"
    elif parts[0] in ("convolutions", "blocks"):
        place, parts = _place(config, parts[0], int(parts[1])), parts[1:]
    else:
        place = parts[0]
    return "/".join([place, *parts[1:]])


def _place(config: HieraConfig, part: str, number: int) -> str:
    first = config.first_attention
    for stage in range(first) if part == "convolutions" else range(first, len(config.depths)):
        if number < config.depths[stage]:
            entry = config.entry(stage, number)
            wider = " wider" if entry.channels != entry.out else ""
            return f"{stage} {number} {config.kinds[stage]}{wider}"
        number -= config.depths[stage]
    return f"enter {first}"


def _by_part(name: str, value: Tensor) -> Tensor:
    """Return queries, keys and values on an axis of their own: each is cut by itself."""
    return value.reshape(3, -1, *value.shape[1:]) if ".qkv." in name else value
