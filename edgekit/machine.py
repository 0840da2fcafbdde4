"""Describe the machine that measured a number: a time without its machine cannot be compared."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def describe() -> dict[str, str | int]:
    """Return the CPU model, the cores that this process may use, and the system. The result contains no host name and
    no path, because results are published."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": cpu_name(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return the CPU's model name, or its architecture if the system does not report the model."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return next(filter(None, names), platform.processor() or platform.machine())


def int8_products(info: Path = Path("/proc/cpuinfo")) -> str:
    """Return how the CPU multiplies int8: 'vnni' if it adds four products in 32 bits; 'saturating' if it adds two in 16
    bits, as older x86 does, which overflows with weights of 8 bits; 'unknown' if the system does not report it."""
    try:
        flags = next(line for line in info.read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return "unknown"
    return "vnni" if {"avx512_vnni", "avx_vnni", "asimddp"} & set(flags.split()) else "saturating"


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Return the total memory, and the memory that programs can use, within the limits of a container; zeros if the
    system reports neither. What a container has read from files counts as free, because the system can drop it."""
    total, free = (_number(root / "proc/meminfo", name, 1024) for name in ("MemTotal:", "MemAvailable:"))
    group = root / "sys/fs/cgroup"
    limit = _number(group / "memory.max")
    if 0 < limit < total:
        used = _number(group / "memory.current") - _number(group / "memory.stat", "file ")
        total, free = limit, min(free, max(limit - used, 0))
    return total, free


def _number(path: Path, name: str = "", unit: int = 1) -> int:
    """Return the number after a name at the start of a line; 0 if there is none."""
    try:
        found = re.search(rf"^{name} *(\d+)", path.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return unit * int(found[1]) if found else 0
