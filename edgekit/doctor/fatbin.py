"""Read from a library for which GPUs it contains code. No GPU, driver or CUDA tool is needed.

nvcc puts device code into the sections .nv_fatbin and __nv_relfatbin: containers (magic 0xBA55ED50, a header of 16
bytes, their length), each with entries: type (1 PTX, 2 machine code), length of header and of payload, and at byte 28
the compute capability as a number such as 61. Payloads, compressed or not, are stepped over. Libraries that link their
kernels at run time (cuFFT) hold the same containers as data, in sections of other names.

Variants for one GPU alone (sm_90a) count as their number (90).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from edgekit.doctor.elf import Elf, Section, damaged, opened
from edgekit.errors import EdgekitError

MAGIC = 0xBA55ED50
SECTIONS = (".nv_fatbin", "__nv_relfatbin")
DATA = (".data", ".rodata", ".ldata", ".lrodata")
PTX, MACHINE_CODE = 1, 2
CONTAINER, ENTRY = 16, 32  # bytes of their headers that are read; entries' are longer
# nvcc of CUDA 11 and 12 compiles for it by default. If a library has only PTX for it, and machine code for others, the
# PTX belongs to a small kernel for which nobody chose an architecture (cuBLASLt, TensorRT 11).
DEFAULT = 52
TEGRA = (53, 62, 72, 87, 101, 110)  # Jetson's


@dataclass(frozen=True, slots=True)
class Code:
    """The GPU code of a library. sms: compute capabilities of its machine code; ptx: those of its PTX, which a driver
    can compile for newer GPUs; needed: names of the libraries that it is linked to."""

    sms: tuple[int, ...] = ()
    ptx: tuple[int, ...] = ()
    needed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.sms or self.ptx)

    def runs_on(self, sm: int) -> bool:
        """Return whether a GPU of this compute capability finds code in it.

        Machine code runs on its own major version from its minor upwards, PTX on everything newer; across Jetsons, and
        between them and other GPUs, machine code is not compatible (CUDA programming guide, binary compatibility).
        """
        ptx = [virtual for virtual in self.ptx if virtual != DEFAULT or not self.sms or DEFAULT in self.sms]
        if any(virtual <= sm for virtual in ptx) or sm in self.sms:
            return True
        same = (real for real in self.sms if real not in TEGRA and real // 10 == sm // 10)
        return sm not in TEGRA and any(real <= sm for real in same)

    def __str__(self) -> str:
        virtual = f", PTX {' '.join(map(str, self.ptx))}" if self.ptx else ""
        return f"sm {' '.join(map(str, self.sms)) or '-'}{virtual}"


def read(path: Path) -> Code:
    """Return the GPU code in a shared library. Raises EdgekitError for a damaged file and for another type of file."""
    with opened(path) as elf:
        found: set[tuple[int, int]] = set()
        for section in elf.sections:
            if section.name in SECTIONS:
                found |= _containers(elf, section)
            elif section.name in DATA:
                found |= _embedded(elf, section)
        return Code(
            tuple(sorted(sm for code_type, sm in found if code_type == MACHINE_CODE)),
            tuple(sorted(sm for code_type, sm in found if code_type == PTX)),
            elf.needed(),
        )


def _containers(elf: Elf, section: Section) -> set[tuple[int, int]]:
    """Return (type, sm) of all entries."""
    found: set[tuple[int, int]] = set()
    at, end = section.offset, section.offset + section.size
    magic = struct.pack("<I", MAGIC)
    while (at := elf.content.find(magic, at, end)) >= 0:  # containers are aligned, with zeros in between
        if end - at < CONTAINER:
            raise damaged(elf.path, f"its GPU code ends within a header at {at}")
        _, _, header, size = struct.unpack_from("<IHHQ", elf.content, at)
        stop = at + header + size
        if header < CONTAINER or stop > end:
            raise damaged(elf.path, f"GPU code at {at} ends at {stop}, its section at {end}")
        found |= _entries(elf, at + header, stop)
        at = stop
    return found


def _embedded(elf: Elf, section: Section) -> set[tuple[int, int]]:
    """Return (type, sm) of the entries of containers among other data; bytes that only look like one are skipped."""
    found: set[tuple[int, int]] = set()
    at, end = section.offset, section.offset + section.size
    magic = struct.pack("<I", MAGIC)
    while 0 <= (at := elf.content.find(magic, at, end)) <= end - CONTAINER:
        _, _, header, size = struct.unpack_from("<IHHQ", elf.content, at)
        try:
            if header < CONTAINER or at + header + size > end:
                raise damaged(elf.path, "no container")
            found |= _entries(elf, at + header, at + header + size)
            at += header + size
        except EdgekitError:
            at += len(magic)
    return found


def _entries(elf: Elf, at: int, stop: int) -> set[tuple[int, int]]:
    found = set()
    while at < stop:
        if stop - at < ENTRY:
            raise damaged(elf.path, f"its GPU code ends within an entry's header at {at}")
        code_type, _, header, size, _, _, _, _, sm = struct.unpack_from("<HHIQIIHHI", elf.content, at)
        if header < ENTRY or at + header + size > stop:
            raise damaged(elf.path, f"an entry at {at} ends at {at + header + size}, its container at {stop}")
        found.add((code_type, sm))
        at += header + size
    return found
