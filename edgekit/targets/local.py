"""Find out whether a target is this machine."""

from __future__ import annotations

import platform
from pathlib import Path

from edgekit.targets import profile
from edgekit.targets.profile import Target

CPU_INFO, DEVICE_TREE = Path("/proc/cpuinfo"), Path("/proc/device-tree/model")


def is_here(target: Target) -> bool:
    """Return whether the profile of a CPU describes this machine: the CPU has the features of the profile, and no other
    matching profile has more. `edgekit doctor` recognises GPUs and boards, because it asks their drivers."""
    if not _fits(target):
        return False
    others = [profile.find(name) for name in profile.names()]
    return not any(set(other.features) > set(target.features) and _fits(other) for other in others)


def here() -> Target | None:
    """Return the profile of this machine's CPU; None if there is none."""
    return next((target for name in profile.names() if is_here(target := profile.find(name))), None)


def cpu_flags(info: Path | None = None) -> frozenset[str]:
    """Return the features of the CPU, as Linux spells them."""
    try:
        lines = (info or CPU_INFO).read_text().splitlines()
    except OSError:
        return frozenset()
    words = (line.partition(":")[2].split() for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(words, []))


def _fits(target: Target) -> bool:
    if target.kind != "cpu" or target.machine != platform.machine() or not target.features:
        return False
    return set(target.features) <= cpu_flags() and (not target.device_tree or _board().startswith(target.device_tree))


def _board() -> str:
    try:
        return DEVICE_TREE.read_text().strip("\0\n")
    except OSError:
        return ""
