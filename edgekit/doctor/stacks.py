"""Recognise which target a machine is, and find which of the target's software stacks are installed and work."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from edgekit.doctor.system import System
from edgekit.targets.profile import Never, Stack, Target

# major version of NVIDIA's system image for Jetsons (L4T) to JetPack version (NVIDIA's JetPack archive)
JETPACKS = {"32": "4", "34": "5", "35": "5", "36": "6", "38": "7", "39": "7"}
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def guess(system: System, targets: Iterable[Target]) -> Target | None:
    """Return the target that this machine is, judged by names; None if no profile describes the machine.

    A Jetson and a board by their device tree, a GPU by name and compute capability, each with the nearest memory; a CPU
    by its instructions, the most demanding target that it fulfils.
    """
    known = list(targets)
    boards = [target for target in known if set(target.device_tree) & set(system.device_tree)]
    if boards:
        exact = max(len(set(target.device_tree) & set(system.device_tree)) for target in boards)
        same = [target for target in boards if len(set(target.device_tree) & set(system.device_tree)) == exact]
        return min(same, key=lambda target: (abs(target.memory.value - system.memory), target.name))
    if system.jetson is not None:
        return None
    if system.gpus:
        gpu = system.gpus[0]
        name = gpu.name.removeprefix("NVIDIA ")
        same = [
            target
            for target in known
            if target.kind == "gpu"
            and re.search(rf"\b{re.escape(name)}\b", target.title)
            and gpu.compute_capability in ("", target.compute_capability)
        ]
        return min(same, key=lambda target: abs(target.memory.value - gpu.memory), default=None)
    fulfilled = [
        target
        for target in known
        if target.kind == "cpu"
        and target.machine == system.machine
        and set(target.features) <= set(system.cpu.flags)
        and not target.device_tree
    ]
    return max(fulfilled, key=lambda target: len(target.features), default=None)


def names(system: System) -> dict[str, str]:
    """Return the installed packages by pip's names, including the TensorRT of the system."""
    found = dict(system.packages)
    if system.tensorrt:
        found.setdefault("tensorrt", system.tensorrt)
    return found


def within(version: str, specifier: str) -> bool:
    """Return whether a version satisfies a specifier; '3.6' stands for 3.6 and all its patch releases."""
    text = specifier if not specifier[:1].isdigit() else f"=={specifier}.*"
    try:
        return Version(version) in SpecifierSet(text, prereleases=True)
    except (InvalidVersion, InvalidSpecifier):  # a vendor's own spelling cannot be compared
        return False


def forbidden(target: Target, installed: Mapping[str, str]) -> list[tuple[str, str, Never]]:
    """Return the installed packages that must never be used on the target: name, version, and the profile's rule."""
    versions = {canonicalize_name(name): version for name, version in installed.items()}
    found: list[tuple[str, str, Never]] = []
    for rule in target.never:
        if rule.requirement:
            requirement = Requirement(rule.requirement)
            name = canonicalize_name(requirement.name)
            if name in versions and within(versions[name], str(requirement.specifier)):
                found.append((name, versions[name], rule))
    return found


def fitting(system: System, target: Target | None) -> tuple[Stack, ...]:
    """Return the target's stacks that the driver, Python and JetPack of this machine allow; all if they allow none."""
    stacks = target.stacks if target else ()
    return tuple(stack for stack in stacks if target and not unfit(system, target, stack)) or stacks


def pins(system: System, target: Target | None, packages: Iterable[str]) -> str:
    """Return the command that installs these packages as a stack of the target pins them; "" if no stack does."""
    wanted = {canonicalize_name(name) for name in packages}
    for stack in fitting(system, target):
        lines = [line for line in stack.requirements if canonicalize_name(Requirement(line).name) in wanted]
        if lines:
            return install(lines)
    return ""


def install(requirements: Iterable[str]) -> str:
    return "pip install " + " ".join(map(shlex.quote, requirements))


def jetpack(system: System) -> str:
    """Return the version of JetPack, or only its major version if the meta-package is not installed."""
    if system.jetson is None:
        return ""
    return system.jetson.jetpack or JETPACKS.get(system.jetson.l4t.partition(".")[0], "")


def branch(driver: str) -> int:
    """Return 580 for driver 580.65.06."""
    head = driver.partition(".")[0]
    return int(head) if head.isdigit() else 0


def python_of(system: System, target: Target) -> str:
    """Return the Python version that a stack's bindings must support; on a Jetson, that of the system."""
    return system.system_python if target.kind == "jetson" else system.python


def unfit(system: System, target: Target, stack: Stack) -> list[str]:
    """Return what prevents a stack and cannot be changed by installing packages."""
    found = []
    python = python_of(system, target)
    if stack.python and python and not within(python, stack.python):
        found.append(f"it is for Python {stack.python}, here is {python}")
    if stack.driver and system.driver and not within(str(branch(system.driver)), stack.driver):
        found.append(f"it is for drivers {stack.driver}, here is {system.driver}")
    release = jetpack(system)
    if stack.jetpack and release and stack.jetpack.partition(".")[0] != release.partition(".")[0]:
        found.append(f"it is for JetPack {stack.jetpack}, here is {release}")
    return found


def lacking(system: System, target: Target, stack: Stack) -> list[str]:
    """Return what a stack lacks to work on this machine."""
    installed = names(system)
    bad = {name for name, _, _ in forbidden(target, installed)}
    wanted = packages_of(stack)
    found = [f"{name} {installed[name]} must not be used" for name in wanted if name in bad]
    if absent := [name for name in wanted if name not in installed]:
        found.append(f"not installed: {', '.join(absent)}")
    if stack.runtime == "tensorrt" and not stack.requirements:
        have = system.tensorrt
        if not have:
            found.append("TensorRT is not installed")
        elif _release(have) != _release(stack.tensorrt) or "tensorrt" in bad:
            found.append(f"TensorRT {have} is installed")
    if stack.provider and any(name.startswith("onnxruntime") for name in installed):
        provider = next((item for item in system.providers if item.name == stack.provider), None)
        if provider is None:
            found.append(f"onnxruntime has no {stack.provider}")
        elif not provider.active:
            found.append(f"nothing ran on {stack.provider}")
    if stack.runtime == "c" and not system.compiler:
        found.append("there is no C compiler")
    return found


def _release(tensorrt: str) -> list[str]:
    """Return the part of a version that decides about operators and options: up to 8, it includes the minor release."""
    parts = tensorrt.split(".")
    return parts[: 2 if parts[0] == "8" else 1]


def packages_of(stack: Stack) -> tuple[str, ...]:
    """Return the names of the packages in a stack."""
    return tuple(canonicalize_name(Requirement(line).name) for line in stack.requirements)


def differing(system: System, stack: Stack) -> list[str]:
    """Return the packages of a stack that are installed in another version than the stack pins."""
    installed = names(system)
    pinned = [Requirement(line) for line in stack.requirements]
    return [
        f"{item.name} {installed[canonicalize_name(item.name)]} instead of {item.specifier}"
        for item in pinned
        if canonicalize_name(item.name) in installed
        and not within(installed[canonicalize_name(item.name)], str(item.specifier))
    ]


def remedy(system: System, stack: Stack) -> str:
    """Say how to install a stack. Two onnxruntime packages share a folder, so the others are uninstalled first."""
    if stack.requirements:
        present = [name for name in RUNTIMES if name in system.packages]
        wanted = set(packages_of(stack)) & set(RUNTIMES)
        other = bool(wanted and set(present) - wanted)
        return f"pip uninstall -y {' '.join(present)} && " * other + install(stack.requirements)
    if stack.runtime == "c":
        return "apt-get install gcc"
    if stack.jetpack:
        return f"it comes with JetPack {stack.jetpack}" if stack.runtime == "tensorrt" else stack.source
    return f"install {stack.name} from NVIDIA's archive (CUDA {stack.cuda}, cuDNN {stack.cudnn})"
