"""A target: what a device can do, the last software that works on it, and what must never be used on it.

The folder `profiles` beside this module contains one TOML file for each device. A user adds a device by putting a file
into `edgekit/targets` in the configuration folder ($XDG_CONFIG_HOME, otherwise ~/.config), or names the file itself.
Every figure has a source: a publication, "measured", or "computed" with its formula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import platformdirs

from edgekit.errors import EdgekitError, unknown
from edgekit.settings import from_table, read_toml

PRECISIONS = ("float32", "float16", "bfloat16", "int8", "int4", "float8")
# bytes that are not the model's: on a GPU of its own, the driver's context and kernels; on a Jetson, where
# the GPU shares the memory, those and the system, 1.5e9 with its desktop and half without; on a CPU, the system
RESERVE = {"gpu": 0.6e9, "jetson": 1.5e9, "cpu": 0.5e9}


@dataclass(frozen=True, slots=True)
class Figure:
    """A number in SI units (bytes, bytes/s, operations/s, seconds, watts) and where it is from."""

    value: float
    source: str

    def __post_init__(self) -> None:
        if not (0 < self.value < math.inf and self.source.strip()):
            raise EdgekitError(
                f"value = {self.value}, source = {self.source!r}; expected a number above 0 and a source"
            )


@dataclass(frozen=True, slots=True)
class Rate:
    """Operations per second in one precision; a multiplication and an addition count as two. If the device has no unit
    for a precision, the profile has no rate for it."""

    dense: Figure
    sparse: Figure | None = None  # with 2:4 sparsity
    note: str = ""


@dataclass(frozen=True, slots=True)
class PowerMode:
    """A clock setting. The rates and the bandwidth of the profile are those of the setting with `share` = 1."""

    name: str
    watts: float
    share: float  # of the full rates
    source: str
    bandwidth_share: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 < self.bandwidth_share <= 1):
            raise EdgekitError(f"share = {self.share}, bandwidth_share = {self.bandwidth_share}; expected 0 to 1")


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The precisions to use, best first, and the reason."""

    order: tuple[str, ...]
    reason: str
    round_to: int = 8  # channels are kept in multiples of this: what the matrix units take at a time
    never: tuple[str, ...] = ()  # precisions that are slower than float32 on the device, or do not run there
    int8: Literal["u8s8", "s8s8", "none"] = "none"  # quantization scheme of Q/DQ graphs: see passes/static_int8.py

    def __post_init__(self) -> None:
        for name in (*self.order, *self.never):
            if name not in PRECISIONS:
                raise unknown("precision", name, PRECISIONS)
        if both := set(self.order) & set(self.never):
            raise EdgekitError(f"precision {min(both)!r} is both in the plan and never to be used")
        if self.round_to < 1:
            raise EdgekitError(f"round_to = {self.round_to}; expected a whole number from 1")
        if (self.int8 == "none") != ("int8" not in self.order):
            raise EdgekitError(f"int8 = {self.int8!r}, order = {list(self.order)}; a plan with int8 names its scheme")


@dataclass(frozen=True, slots=True)
class Stack:
    """Versions that work together on the device. requirements: pinned lines for pip; empty if the software is part of
    the system image of the device."""

    name: str
    runtime: Literal["onnxruntime", "tensorrt", "tensorrt-rtx", "openvino", "c"]
    source: str
    requirements: tuple[str, ...] = ()
    python: str = ""  # such as "3.6" or ">=3.11"
    opset: int | None = None  # the newest opset that its parser accepts
    provider: str = ""  # the onnxruntime provider that really runs there
    tensorrt: str = ""
    cuda: str = ""
    cudnn: str = ""
    driver: str = ""  # such as ">=525,<=580": branches
    jetpack: str = ""
    typing: Literal["", "weak", "strong"] = ""  # of TensorRT networks: precision by builder flags, or by the graph


@dataclass(frozen=True, slots=True)
class Never:
    """What does not work on the device, or is slow there without any warning."""

    what: str
    why: str
    source: str
    requirement: str = ""  # in pip's notation, if it is a package: "nvidia-cudnn-cu12>=9.11"


@dataclass(frozen=True, slots=True)
class Target:
    """One device."""

    name: str  # kebab case, as on the command line
    title: str
    kind: Literal["gpu", "jetson", "cpu"]
    machine: Literal["x86_64", "aarch64"]  # of the host that the runtime is installed on
    memory: Figure  # bytes
    bandwidth: Figure  # bytes/s
    launch: Figure  # seconds that even the smallest kernel or operator takes
    rates: Mapping[str, Rate]  # by precision; of a CPU, of one core
    plan: PrecisionPlan
    stacks: tuple[Stack, ...]  # the recommended one first
    units: Mapping[str, float] = field(default_factory=dict)  # {"SMs": 30, "CUDA cores": 3840}
    cores: int = 1  # of a CPU: rates are per core
    compute_capability: str = ""  # "6.1"
    unified_memory: bool = False  # the host's programs take from it too
    device_tree: tuple[str, ...] = ()  # what a Jetson's device tree may call it
    features: tuple[str, ...] = ()  # CPU flags that it stands for
    power: tuple[PowerMode, ...] = ()
    never: tuple[Never, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.rates:
            if name not in PRECISIONS:
                raise unknown("precision", name, PRECISIONS)
        if "float32" not in self.rates or not self.stacks:
            raise EdgekitError("a target needs at least a float32 rate and one stack")
        if self.kind != "cpu" and not re.fullmatch(r"[0-9]+\.[0-9]", self.compute_capability):
            raise EdgekitError(f"compute_capability = {self.compute_capability!r}; every GPU has one, such as '6.1'")
        if self.cores < 1:
            raise EdgekitError(f"cores = {self.cores}; expected a whole number from 1")
        for name in self.plan.order:
            if name not in self.rates:
                raise EdgekitError(f"the plan uses {name}, for which no rate is given")

    @property
    def sm(self) -> int | None:
        """Return 61 for compute capability 6.1."""
        return int(self.compute_capability.replace(".", "")) if self.compute_capability else None

    @property
    def stack(self) -> Stack:
        """Return the recommended stack."""
        return self.stacks[0]

    def stack_for(self, runtime: str) -> Stack:
        """Return the first stack with this runtime."""
        found = next((stack for stack in self.stacks if stack.runtime == runtime), None)
        if found is None:
            raise unknown("runtime", runtime, dict.fromkeys(stack.runtime for stack in self.stacks), where=self.name)
        return found

    def refuse(self, precision: str) -> None:
        """Raise EdgekitError if this precision must not be used on the device."""
        if precision in self.plan.never:
            allowed = ", ".join(self.plan.order)
            raise EdgekitError(f"{self.name} must not be given {precision}: {self.plan.reason} Use one of: {allowed}")


def names() -> list[str]:
    """Return the names of all targets, sorted."""
    return sorted(_files())


def list_targets() -> list[Target]:
    """Return every known device, in the order of the names: those that come with edgekit, and the user's own.

    >>> import edgekit
    >>> "jetson-nano" in [target.name for target in edgekit.list_targets()]
    True
    """
    return [find(name) for name in names()]


def find(text: str) -> Target:
    """Return a target by its name, or from a TOML file of the user."""
    return read(path_of(text))


def path_of(text: str) -> Path:
    """Return the file of a target; the error for an unknown name lists the known ones."""
    if text.endswith(".toml"):
        return Path(text)
    files = _files()
    if text not in files:
        raise unknown("target", text, sorted(files))
    return files[text]


@cache
def read(path: Path) -> Target:
    """Read and check a profile; a wrong key or value is an error that names it and what is allowed."""
    try:
        values = read_toml(path)
    except FileNotFoundError:
        raise EdgekitError(f"{path}: no such target file; `edgekit targets` lists the known devices") from None
    except OSError as error:
        raise EdgekitError(f"{path}: cannot be read: {error.strerror}") from None
    for text in _texts(values):
        if not text.isprintable():  # a line end in a title would begin a new line of a script
            raise EdgekitError(f"{path}: {text[:60]!r} holds a control character; write each text on one line")
    target: Target = from_table(Target, values, str(path))
    if target.name != path.stem:
        raise EdgekitError(f"{path}: name = {target.name!r}; expected the file's own name, {path.stem!r}")
    return target


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in the tables of a file, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from (key, *_texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def user_folder() -> Path:
    """Return the folder of the user's own targets."""
    return platformdirs.user_config_path("edgekit") / "targets"


def _files() -> dict[str, Path]:
    """Return the file of each target by name; a file of the user replaces a profile of edgekit."""
    folders = (Path(__file__).parent / "profiles", user_folder())
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}
