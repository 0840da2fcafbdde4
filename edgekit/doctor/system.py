"""The facts about a machine as plain data, so that checks are pure and one machine can judge the record of another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from edgekit.doctor.fatbin import Code
from edgekit.errors import EdgekitError
from edgekit.settings import from_table


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor. flags: as the kernel spells them, such as avx512_vnni or asimddp."""

    name: str = ""
    vendor: str = ""
    cores: int = 1  # that this process may use
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU that the driver shows. Memory in bytes."""

    name: str
    compute_capability: str = ""  # "6.1"; empty where the driver is too old to tell
    memory: int = 0
    free: int = 0

    @property
    def sm(self) -> int | None:
        """61 for compute capability 6.1."""
        return int(self.compute_capability.replace(".", "")) if self.compute_capability else None


@dataclass(frozen=True, slots=True)
class Library:
    """A shared library that contains GPU code or is linked to one. package: its distribution, otherwise its folder."""

    name: str
    package: str
    version: str = ""
    sms: tuple[int, ...] = ()
    ptx: tuple[int, ...] = ()
    needed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()  # of the needed ones
    problem: str = ""  # why it could not be read

    @property
    def code(self) -> Code:
        return Code(self.sms, self.ptx, self.needed)


@dataclass(frozen=True, slots=True)
class Provider:
    """An onnxruntime provider that says it is available. ran: the providers that the nodes of a small network really
    ran on, when this one was asked for; preloaded: only after onnxruntime.preload_dlls()."""

    name: str
    ran: tuple[str, ...] = ()
    preloaded: bool = False
    problem: str = ""

    @property
    def active(self) -> bool:
        """Whether every node really ran on this provider."""
        return self.ran == (self.name,)


@dataclass(frozen=True, slots=True)
class Jetson:
    """What NVIDIA's system image says. jetpack: of the meta-package, where it is installed."""

    l4t: str = ""  # "36.4.3"
    jetpack: str = ""  # "6.2"
    mode: str = ""  # of nvpmodel: "MAXN"
    clocks: Literal["", "free", "locked"] = ""  # by jetson_clocks; empty: not told, for example without root


@dataclass(frozen=True, slots=True)
class Blas:
    """A linear algebra library that NumPy loaded, and the kernels it chose for this CPU."""

    library: str
    version: str = ""
    kernel: str = ""


@dataclass(frozen=True, slots=True)
class System:
    """All observed facts. A field is empty if the thing is absent. Memory is in bytes."""

    machine: str  # "x86_64"
    os: str = "Linux"
    python: str = ""  # that runs edgekit: "3.11.2"
    system_python: str = ""  # /usr/bin/python3: the one that a Jetson's TensorRT is built for
    cpu: Cpu = field(default_factory=Cpu)
    memory: int = 0
    available: int = 0
    device_tree: tuple[str, ...] = ()  # model and compatible strings of an ARM board
    jetson: Jetson | None = None
    pci_gpus: int = 0  # NVIDIA GPUs on the bus, driver or not
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""  # "580.65.06"
    driver_problem: str = ""  # what the driver's tools say when they fail
    cuda: str = ""  # newest that the driver knows: "12.8"
    nvcc: str = ""  # version of the CUDA compiler
    trtexec: str = ""  # path
    system_libraries: Mapping[str, str] = field(default_factory=dict)  # outside of Python: {"libnvinfer": "10.3.0"}
    libraries: tuple[Library, ...] = ()
    packages: Mapping[str, str] = field(default_factory=dict)  # of Python, name to version
    providers: tuple[Provider, ...] = ()
    providers_problem: str = ""  # why onnxruntime could not be asked
    llama_cpp: str = ""  # the build that runs language models: "xllamacpp 2026.10.11549"
    blas: tuple[Blas, ...] = ()
    compiler: str = ""  # first line of its --version
    environment: Mapping[str, str] = field(default_factory=dict)  # variables that change what is chosen

    def to_dict(self) -> dict[str, Any]:
        """The system as plain values, without empty fields."""
        return dict(_plain(self))

    @property
    def tensorrt(self) -> str:
        """Version of the TensorRT that is installed, by pip or by the system; empty without one."""
        names = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")
        packaged = next((self.packages[name] for name in names if name in self.packages), "")
        return packaged or self.system_libraries.get("libnvinfer", "")


def from_dict(values: Any, source: str) -> System:
    """The inverse of `System.to_dict`; a wrong key or value is an error that names it."""
    if not isinstance(values, Mapping):
        raise EdgekitError(f"{source}: not a recorded system; write one with: edgekit doctor --json")
    system: System = from_table(System, values, source)
    return system


def read(path: Path) -> System:
    """A system from a file that `edgekit doctor --json` wrote."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise EdgekitError(f"{path}: no such file; record a system with: edgekit doctor --json > {path}") from None
    except (ValueError, RecursionError) as error:
        raise EdgekitError(f"{path}: not valid JSON ({error}); record it again: edgekit doctor --json") from None
    return from_dict(values.get("system", values) if isinstance(values, dict) else values, str(path))


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        pairs = [(item.name, _plain(getattr(value, item.name))) for item in fields(value)]
        return {name: item for name, item in pairs if item not in (None, "", 0, False, [], {})}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, Mapping) else value
