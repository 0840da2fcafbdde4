"""The architecture of a hierarchical image classifier: its constructor arguments, what fits together, and what enters
each block."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgekit.errors import EdgekitError

# name -> kernel, stride and padding of each convolution from the image to the first tokens
STEMS = {"conv7": ((7, 4, 3),), "patch4": ((4, 4, 0),), "conv3x2": ((3, 2, 1), (3, 2, 1))}
CONVOLUTIONS = ("inverted", "separable", "rep")
ATTENTIONS = ("window", "global", "levit")
MOST_BLOCKS, MOST_WIDTH, MOST_SIDE = 200, 8192, 2048
MOST_NUMBERS = 1 << 28  # of weights; Hiera-L has 214 million


@dataclass(frozen=True, slots=True)
class Entry:
    """What enters a block and leaves it. channels, out: widths; units, tokens: mask units, and tokens in each of them,
    at the entry; a convolution has one unit; pool: whether a quarter of the tokens leaves."""

    channels: int
    out: int
    units: int
    tokens: int
    pool: bool


@dataclass(frozen=True, slots=True)
class HieraConfig:
    """Constructor arguments, as a bundle stores them. Tuples have one item for each stage, `pools` one fewer.

    width: of the first stage; it doubles with every further stage. kinds: window (mask-unit attention), global
    (attention between all tokens), levit (the same in blocks that are cheap on CPUs), inverted, separable, rep. ratios:
    width of the inner layer of a block in widths of the block; unused in separable and rep. pools: whether the next
    stage begins with half the side. mask_unit: tokens along a side of a mask unit, where attention begins.
    """

    depths: tuple[int, ...]
    kinds: tuple[str, ...]
    ratios: tuple[int, ...]
    pools: tuple[bool, ...]
    width: int
    head_dim: int
    mask_unit: int = 8
    stem: str = "conv7"
    image: int = 224
    channels: int = 3
    classes: int = 1000

    def __post_init__(self) -> None:
        for name in ("depths", "kinds", "ratios", "pools"):  # a bundle stores lists
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise EdgekitError(f"hiera: {name} = {value!r}; expected one value for each stage")
            object.__setattr__(self, name, tuple(value))
        if problem := self.problem():
            raise EdgekitError(f"hiera: {problem}")

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width << stage for stage in range(len(self.depths)))

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens along a side at the end of each stage."""
        side, sides = self.image // 4, []
        for stage in range(len(self.depths)):
            side //= 2 if stage and self.pools[stage - 1] else 1
            sides.append(side)
        return tuple(sides)

    @property
    def first_attention(self) -> int:
        """The first stage with attention, or the number of stages."""
        return next((n for n, kind in enumerate(self.kinds) if kind in ATTENTIONS), len(self.kinds))

    @property
    def units(self) -> int:
        """Mask units of an image."""
        return (self.sides[self.first_attention] // self.mask_unit) ** 2

    @property
    def most_numbers(self) -> int:
        """An upper bound of the weights, known before anything is built."""
        blocks = sum(
            depth * max(6 + 2 * ratio, 11) * width * (width + 9)
            for depth, ratio, width in zip(self.depths, self.ratios, self.widths, strict=True)
        )
        tokens = (self.image // 4) ** 2
        return blocks + (49 * self.channels + 9 * self.width + tokens) * self.width + self.widths[-1] * self.classes

    def entry(self, stage: int, number: int) -> Entry:
        """Return what enters and leaves a block. The first block of a stage changes the width and pools; where
        attention begins, a convolution before it has changed both."""
        first, out = self.first_attention, self.widths[stage]
        changes = number == 0 and stage > 0 and stage != first
        channels, pool = (self.widths[stage - 1], self.pools[stage - 1]) if changes else (out, False)
        if stage < first:
            side = self.sides[stage - 1] if changes else self.sides[stage]
            return Entry(channels, out, 1, side * side, pool)
        pooled = sum(self.pools[first:stage]) - pool
        return Entry(channels, out, self.units, self.mask_unit**2 >> 2 * pooled, pool)

    def attention(self, stage: int, number: int) -> str:
        """Return the kind of attention of a block: the first block of a stage attends as the stage before it does."""
        return self.kinds[stage - 1 if number == 0 and stage > self.first_attention else stage]

    def problem(self) -> str:
        """Say what is wrong with the arguments; "" if nothing is."""
        stages = len(self.depths)
        if not 1 <= stages <= 8 or not (len(self.kinds) == len(self.ratios) == stages == len(self.pools) + 1):
            return "depths, kinds and ratios need one value for each of 1 to 8 stages, and pools one fewer"
        for name, most in (
            ("width", MOST_WIDTH), ("head_dim", MOST_WIDTH), ("mask_unit", MOST_SIDE), ("image", MOST_SIDE),
            ("channels", MOST_WIDTH), ("classes", 1 << 20),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                return f"{name} = {value!r}; expected a whole number from 1 to {most:,}"
        if any(type(n) is not int or not 1 <= n <= MOST_BLOCKS for n in (*self.depths, *self.ratios)):
            return f"depths = {self.depths}, ratios = {self.ratios}; expected whole numbers from 1 to {MOST_BLOCKS}"
        if any(type(pool) is not bool for pool in self.pools):
            return f"pools = {self.pools}; expected true or false for each stage but the first"
        if self.stem not in STEMS:
            return f"stem = {self.stem!r}; allowed: {', '.join(STEMS)}"
        for kind in self.kinds:
            if kind not in (*CONVOLUTIONS, *ATTENTIONS):
                return f"kind {kind!r}; allowed: {', '.join((*ATTENTIONS, *CONVOLUTIONS))}"
        if any(kind in CONVOLUTIONS for kind in self.kinds[self.first_attention :]):
            return f"kinds = {self.kinds}; convolutional stages come before those with attention"
        if (numbers := self.most_numbers) > MOST_NUMBERS:
            return f"these sizes are a network of up to {numbers:,} numbers; edgekit builds up to {MOST_NUMBERS:,}"
        if self.image % (4 << sum(self.pools)):
            return f"image = {self.image}; expected a multiple of {4 << sum(self.pools)}, for these pools"
        return self._problem_of_attention()

    def _problem_of_attention(self) -> str:
        first = self.first_attention
        if first == len(self.kinds):
            return ""
        if self.sides[first] % self.mask_unit:
            return f"mask_unit = {self.mask_unit}; it must divide the {self.sides[first]} tokens of a side"
        if self.mask_unit % (1 << sum(self.pools[first:])):
            return (
                f"mask_unit = {self.mask_unit}; expected a multiple of {1 << sum(self.pools[first:])}, for these pools"
            )
        if self.widths[first] % self.head_dim:
            return f"head_dim = {self.head_dim}; it must divide the width {self.widths[first]}"
        if "levit" in self.kinds and self.head_dim % 2:
            return f"head_dim = {self.head_dim}; levit stages need an even one: keys have half the width"
        return ""


def arguments(config: HieraConfig) -> dict[str, Any]:
    """Return the constructor arguments as JSON has them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def published(depths: tuple[int, ...], width: int, heads: int, *, classes: int = 1000, image: int = 224) -> HieraConfig:
    """Return the configuration of one of the authors' networks: Tiny is ((1, 2, 7, 2), 96, 1) (table 7)."""
    return HieraConfig(
        depths, ("window", "window", "global", "global"), (4,) * 4, (True,) * 3, width, width // heads,
        image=image, classes=classes,
    )  # fmt: skip
