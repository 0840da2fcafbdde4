"""The machine that a number was measured on: a time without one says nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> dict[str, str | int]:
    """CPU model, cores this process may use, system. No host name and no path: results are published."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cpu": cpu_name(), "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name; where the system does not tell, its architecture."""
    try:
        lines = info.read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.lower().startswith(("model name", "hardware"))]
    return next(filter(None, names), platform.processor() or platform.machine())


def int8_products(info: Path = Path("/proc/cpuinfo")) -> str:
    """'vnni' where the CPU adds four int8 products in 32 bits; 'saturating' where, as on older x86, two in 16, which
    overflows with weights of 8 bits; 'unknown' where the system does not tell."""
    try:
        flags = next(line for line in info.read_text().splitlines() if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return "unknown"
    return "vnni" if {"avx512_vnni", "avx_vnni", "asimddp"} & set(flags.split()) else "saturating"
