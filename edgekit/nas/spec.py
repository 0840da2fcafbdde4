"""What a study is to do: a TOML file of four tables. It determines the result, with the data and, where time is a limit
or an objective, this machine's operator table. A fifth table, [compress], says what happens to the finalists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekit.compression import recipe
from edgekit.compression.recipe import Step
from edgekit.cost.roofline import estimate
from edgekit.errors import EdgekitError, unknown
from edgekit.nas.latency import WORST, exported, measure
from edgekit.nas.outline import outline
from edgekit.nas.proxies import PROXIES
from edgekit.nas.space import Space, described, open_space
from edgekit.nas.strategies import STRATEGIES
from edgekit.nn.hiera_config import published
from edgekit.settings import from_table, read_toml
from edgekit.targets.profile import find, names

FORMAT = 1  # of a study's journal
COSTS = ("macs", "parameters", "activations", "milliseconds")
THIS_CPU = "turbovit-this-cpu"
PRESETS = ("turbovit-envelope", THIS_CPU)
OF_TARGET = "turbovit-"  # and the name of one of `edgekit targets`: the envelope on that device
TABLES = ("space", "limits", "search", "score", "compress")
AUTO = "auto"  # in place of a recipe
FEWEST_CHECKED = 6  # networks that are trained alone before a supernet may judge others


@dataclass(frozen=True, slots=True)
class Limits:
    """What a network may have at most. parameters: stored numbers; macs: multiply-accumulates of a call; activations:
    bytes alive at once; milliseconds: of a call; batch: images of a call. target: the device whose time counts (see
    `edgekit targets`), estimated from its data sheet, and in whose memory a network must fit; by default the CPU time
    of this machine counts, in ONNX Runtime on one thread."""

    parameters: float | None = None
    macs: float | None = None
    activations: float | None = None
    milliseconds: float | None = None
    batch: int = 1
    target: str = ""

    def __post_init__(self) -> None:
        for name in COSTS:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise EdgekitError(f"{name} = {value}; expected a number above 0")
        if not 1 <= self.batch <= 4096:
            raise EdgekitError(f"batch = {self.batch}; expected 1 to 4096 images")

    def broken(self, costs: Mapping[str, float]) -> list[str]:
        """Return the limits that a network with these costs breaks."""
        limits = {name: getattr(self, name) for name in costs}
        return [f"{name} = {limit:g}" for name, limit in limits.items() if limit is not None and costs[name] > limit]


@dataclass(frozen=True, slots=True)
class Search:
    """How networks are proposed. candidates: networks to try; generation: networks proposed from the same results;
    control: whether as many random networks are tried beside them; cost: what is to be small beside the limits."""

    strategy: str = "generator"
    candidates: int = 48
    generation: int = 12
    seed: int = 0
    control: bool = True
    cost: str = "macs"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise unknown("strategy", self.strategy, STRATEGIES, where="[search]")
        if self.cost not in COSTS:
            raise unknown("cost", self.cost, COSTS, where="[search]")
        if not 2 <= self.generation <= self.candidates <= 100_000:
            raise EdgekitError(
                f"candidates = {self.candidates}, generation = {self.generation}; expected 2 or more networks of a "
                "generation, and at least as many candidates, up to 100,000"
            )

    @property
    def arms(self) -> tuple[str, ...]:
        """The strategies that run."""
        return (self.strategy, "random") if self.control and self.strategy != "random" else (self.strategy,)


@dataclass(frozen=True, slots=True)
class Score:
    """What a network is good at. data: images and labels as for `edgekit compress --data`; without it the proxy is the
    score. epochs: of training in each rung; a rung trains the networks that the one before it kept (keep), and the last
    rung trains each with `seeds` seeds and judges it on the test rows. validation: the share of training rows on which
    all earlier rungs judge. supernet: epochs of training for one set of weights that all networks share, which then
    judges the first rung if its scores agree with those of `check` networks that were trained alone; 0 for none."""

    data: str = ""
    proxy: str = "jacobian"
    epochs: tuple[int, ...] = (5, 15)
    keep: tuple[int, ...] = (4,)
    seeds: int = 3
    validation: float = 0.1
    batch: int = 64
    learning_rate: float = 3e-3
    supernet: int = 0
    check: int = 8

    def __post_init__(self) -> None:
        if self.supernet < 0 or self.check < FEWEST_CHECKED:
            raise EdgekitError(
                f"supernet = {self.supernet}, check = {self.check}; expected epochs, and {FEWEST_CHECKED} or more "
                "networks to compare it with"
            )
        if self.supernet and not self.data:
            raise EdgekitError(f"supernet = {self.supernet} needs data, on which it is trained")
        if self.proxy not in PROXIES:
            raise unknown("proxy", self.proxy, PROXIES, where="[score]")
        if len(self.keep) != len(self.epochs) - 1 or not self.epochs or not self.keep:
            raise EdgekitError(
                f"epochs = {list(self.epochs)}, keep = {list(self.keep)}; expected the epochs of two rungs "
                "or more, and how many networks each but the last one keeps"
            )
        if min(*self.epochs, *self.keep, self.seeds, self.batch) < 1 or not 0 < self.validation < 1:
            raise EdgekitError("epochs, keep, seeds and batch are whole numbers from 1, and 0 < validation < 1")


@dataclass(frozen=True, slots=True)
class Compression:
    """How each finalist is compressed at the end. recipe: the passes, as [[compress.pass]] tables; auto: search for
    them, with `trials` trials; max_loss: the share of test rows that may become wrong; objective: what a pass must
    gain. The batch size, the target and the seed are the study's."""

    recipe: tuple[Step, ...] = ()
    auto: bool = False
    max_loss: float = 0.01
    trials: int = 40
    objective: str = "any"

    def __post_init__(self) -> None:
        if bool(self.recipe) == self.auto:
            raise EdgekitError("expected either auto = true or the passes of a recipe, [[compress.pass]] name = ...")
        if not 0 <= self.max_loss < 1 or self.trials < 1:
            raise EdgekitError(
                f"max_loss = {self.max_loss}, trials = {self.trials}; expected a share of the rows from 0 to 1, and at "
                "least one trial"
            )


@dataclass(frozen=True, slots=True)
class Spec:
    """A study's tables."""

    space: Space
    limits: Limits
    search: Search
    score: Score
    compress: Compression | None = None  # it changes no result of the study

    def __post_init__(self) -> None:
        if self.compress and not self.score.data:
            raise EdgekitError(
                "[compress] needs [score] data: without rows, nothing says what a compressed network loses"
            )

    @property
    def timed(self) -> bool:
        """Whether the time of networks matters."""
        limits = self.limits
        return limits.milliseconds is not None or bool(limits.target) or self.search.cost == "milliseconds"

    def as_json(self) -> dict[str, Any]:
        parts = {name: asdict(getattr(self, name)) for name in ("limits", "search", "score")}
        found: dict[str, Any] = json.loads(json.dumps({"space": described(self.space), **parts}))
        return found

    def study(self, data: str, table: str) -> str:
        """Return the study's id: 16 hexadecimal digits of all that its result depends on. data, table: digests of the
        rows and of the operator table."""
        content = {"format": FORMAT, **self.as_json(), "data": data, "table": table}
        del content["score"]["data"]  # the rows count, and not what their file is called
        if not self.score.supernet:  # studies that began before there was one keep their id
            del content["score"]["supernet"], content["score"]["check"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_spec(path: Path) -> Spec:
    """Return the spec of a TOML file."""
    if not path.is_file():
        raise EdgekitError(f"{path}: no such file; expected TOML with the tables {', '.join(TABLES)}")
    return spec_of(read_toml(path), str(path))


def preset_text(name: str) -> str:
    """Return one of the packaged specs, as TOML. turbovit-TARGET is that of this CPU with a target in its place; both
    limit the time to half of what a Hiera of TurboViT's size takes there, measured or by the target's data sheet."""
    target = name.removeprefix(OF_TARGET)
    if name not in PRESETS and (not name.startswith(OF_TARGET) or target not in names()):
        raise unknown("preset", name, (*PRESETS, *(OF_TARGET + item for item in names())), where="edgekit search")
    packaged = name if name in PRESETS else THIS_CPU
    text = files("edgekit.nas").joinpath(f"presets/{packaged}.toml").read_text(encoding="utf-8")
    if packaged != THIS_CPU:
        return text
    hiera, of_target = published((1, 2, 7, 2), width=64, heads=1), f'target = "{target}"\n'
    if name == THIS_CPU:
        seconds, of_target = measure([exported(hiera)])[0].seconds, ""
    else:
        seconds = WORST * estimate(outline(hiera).work, find(target), 1).seconds  # what a limit counts an estimate as
    return text.replace("[limits]\n", f"[limits]\n{of_target}milliseconds = {500 * seconds:.3g}\n")


def spec_of(tables: Mapping[str, Any], where: str) -> Spec:
    """Return the spec of these tables."""
    for name in tables:
        if name not in TABLES:
            raise unknown("table", name, TABLES, where=where)
    if "space" not in tables:
        raise EdgekitError(f'{where}: the table [space] is missing; for example: [space] name = "hybrid2d"')
    space = tables["space"]
    if not isinstance(space, Mapping):
        raise EdgekitError(f"{where}: space is {space!r}; expected a table")
    return Spec(
        open_space(space, f"{where}: [space]"),
        from_table(Limits, tables.get("limits", {}), f"{where}: [limits]"),
        from_table(Search, tables.get("search", {}), f"{where}: [search]"),
        from_table(Score, tables.get("score", {}), f"{where}: [score]"),
        _compression(tables["compress"], where) if "compress" in tables else None,
    )


def compression_table(recipe_or_auto: str | Path) -> dict[str, Any]:
    """Return the [compress] table of a recipe's file, or of "auto"."""
    if str(recipe_or_auto) == AUTO:
        return {"auto": True}
    return recipe.to_tables(recipe.read(recipe_or_auto))


def _compression(table: Any, where: str) -> Compression:
    where = f"{where}: [compress]"
    if not isinstance(table, Mapping):
        raise EdgekitError(f"{where} is {table!r}; expected a table")
    values = {name: value for name, value in table.items() if name != "pass"}
    if "recipe" in values:
        raise unknown("key", "recipe", ("pass", "auto", "max_loss", "trials", "objective"), where=where)
    if "pass" in table:
        values["recipe"] = tuple(recipe.parse({"pass": table["pass"]}, where))
    found: Compression = from_table(Compression, values, where)
    return found
