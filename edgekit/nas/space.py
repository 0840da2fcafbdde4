"""The space of architectures as data: what each part of a network may be, and how networks are drawn, changed and
crossed.

A space is a TOML file of lists (`spaces/`, or a study's own). A choice has one index for each of its factors; factors
that a network does not use, such as the width of heads in a network of convolutions, do not make it another network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

import numpy as np

from edgekit.errors import EdgekitError, unknown
from edgekit.nn.hiera_config import CONVOLUTIONS, HieraConfig, arguments
from edgekit.settings import from_table

NAMES = ("hiera2d", "hybrid2d")
WITHOUT_RATIO = ("separable", "rep")
MOST_CHOICES = 64  # of one factor
Choice = tuple[int, ...]  # an index for each factor


@dataclass(frozen=True, slots=True)
class Space:
    """Lists of what a network may have. depths, ratios, kinds: a list for each stage; pools: for each stage but the
    first. image, channels, classes: what all networks have."""

    stem: tuple[str, ...]
    width: tuple[int, ...]
    head_dim: tuple[int, ...]
    mask_unit: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    ratios: tuple[tuple[int, ...], ...]
    kinds: tuple[tuple[str, ...], ...]
    pools: tuple[tuple[bool, ...], ...]
    name: str = ""
    image: int = 224
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for factor, values in self.factors.items():
            if not 1 <= len(values) <= MOST_CHOICES or len(set(map(repr, values))) < len(values):
                raise EdgekitError(
                    f"{factor} = {list(values)!r}; expected 1 to {MOST_CHOICES} different values that it may have"
                )
        if not len(self.depths) == len(self.ratios) == len(self.kinds) == len(self.pools) + 1:
            raise EdgekitError(
                f"{len(self.depths)} depths, {len(self.ratios)} ratios, {len(self.kinds)} kinds and {len(self.pools)} "
                "pools; expected a list for each stage, and for pools one list fewer"
            )

    @property
    def factors(self) -> dict[str, tuple[Any, ...]]:
        """What a network may be, by the factor's name."""
        single = {name: getattr(self, name) for name in ("stem", "width", "head_dim", "mask_unit")}
        several = {
            f"{name}{stage + 1 + (name == 'pools')}": tuple(values)
            for name in ("depths", "ratios", "kinds", "pools")
            for stage, values in enumerate(getattr(self, name))
        }
        return single | several

    @property
    def size(self) -> int:
        """The number of choices; some are the same network, and some are no network."""
        return math.prod(map(len, self.factors.values()))

    def config(self, choice: Choice) -> HieraConfig:
        """Return the network of a choice. Raises EdgekitError if its parts do not fit together."""
        values = dict(
            zip(
                self.factors,
                (options[index] for options, index in zip(self.factors.values(), choice, strict=True)),
                strict=True,
            )
        )
        stages = range(len(self.depths))
        kinds = tuple(values[f"kinds{n + 1}"] for n in stages)
        return plain(
            HieraConfig(
                depths=tuple(values[f"depths{n + 1}"] for n in stages),
                kinds=kinds,
                ratios=tuple(values[f"ratios{n + 1}"] for n in stages),
                pools=tuple(values[f"pools{n + 2}"] for n in range(len(self.pools))),
                width=values["width"],
                head_dim=values["head_dim"],
                mask_unit=values["mask_unit"],
                stem=values["stem"],
                image=self.image,
                channels=self.channels,
                classes=self.classes,
            )
        )

    def sample(self, rng: np.random.Generator, weights: Mapping[str, Sequence[float]] | None = None) -> Choice:
        """Draw a choice; weights: of each value, by factor, instead of equal ones."""
        return tuple(
            int(rng.choice(len(values), p=None if weights is None else weights[factor]))
            for factor, values in self.factors.items()
        )

    def mutated(self, choice: Choice, rng: np.random.Generator, rate: float) -> Choice:
        """Draw some factors again, at least one."""
        lengths = [len(values) for values in self.factors.values()]
        drawn = rng.random(len(choice)) < rate
        drawn[rng.integers(len(choice))] = True
        return tuple(
            int(rng.integers(length)) if again else index
            for index, length, again in zip(choice, lengths, drawn, strict=True)
        )

    def crossed(self, first: Choice, second: Choice, rng: np.random.Generator) -> Choice:
        """Take each factor from one of two choices."""
        from_first = rng.random(len(first)) < 0.5
        return tuple(a if taken else b for a, b, taken in zip(first, second, from_first, strict=True))


def plain(config: HieraConfig) -> HieraConfig:
    """Return the same network with the smallest values of what it does not use."""
    ratios = tuple(
        1 if kind in WITHOUT_RATIO else ratio for kind, ratio in zip(config.kinds, config.ratios, strict=True)
    )
    if all(kind in CONVOLUTIONS for kind in config.kinds):
        return replace(config, ratios=ratios, head_dim=1, mask_unit=1)
    first = config.first_attention
    if all(kind != "window" for kind in config.kinds[first:]):
        # one unit of all tokens is the same attention, and has the same order of pools
        return replace(config, ratios=ratios, mask_unit=config.sides[first])
    return replace(config, ratios=ratios)


def key_of(config: HieraConfig) -> str:
    """Return the name of a network: 16 hexadecimal digits that its arguments determine."""
    return hashlib.sha256(json.dumps(arguments(config), sort_keys=True).encode()).hexdigest()[:16]


def open_space(table: Mapping[str, Any], where: str = "[space]") -> Space:
    """Return the space of a table: a packaged one by its `name`, with the other keys in place of its own, or one with
    all lists."""
    name = table.get("name", "")
    if not name:
        own: Space = from_table(Space, table, where)
        return own
    if name not in NAMES:
        raise unknown("space", str(name), NAMES, where=where)
    import tomllib

    packaged = tomllib.loads(files("edgekit.nas").joinpath(f"spaces/{name}.toml").read_text(encoding="utf-8"))
    found: Space = from_table(Space, {**packaged, **table}, where)
    return found


def described(space: Space) -> dict[str, Any]:
    """Return the space as JSON."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(space)))
    return found
