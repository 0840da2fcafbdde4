"""Read from an ELF file what the doctor needs: the table of sections, and the libraries that the file needs.

Format: System V gABI 4.1, chapters 4 and 5. Any offset and size in a file may be wrong, so each is compared with the
file's length before it is used, and no number of the file decides how much memory is allocated.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError

HEADER, SECTION = 64, 64  # bytes of the file's header and of one entry in the table, 64-bit
DYNAMIC, NOBITS = 6, 8  # types of sections; the latter takes no space in the file
NEEDED = 1  # tag in the dynamic section


@dataclass(frozen=True, slots=True)
class Section:
    """A named range of the file. link: number of the section with its strings."""

    name: str
    section_type: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True, slots=True)
class Elf:
    """An open file and its sections."""

    path: Path
    content: mmap.mmap
    sections: tuple[Section, ...]

    def needed(self) -> tuple[str, ...]:
        """Return the names of the shared libraries that the loader must find."""
        names = []
        for section in self.sections:
            if section.section_type != DYNAMIC:
                continue
            if section.link >= len(self.sections):
                raise damaged(self.path, f"section {section.name!r} has its strings in section {section.link}")
            strings = self.sections[section.link]
            for at in range(section.offset, section.offset + section.size - 15, 16):
                tag, value = struct.unpack_from("<qQ", self.content, at)
                if tag == NEEDED:
                    names.append(_string(self.path, self.content, strings, value))
        return tuple(names)


@contextmanager
def opened(path: Path) -> Iterator[Elf]:
    """Map the file into memory. Raises EdgekitError for a file that is not a complete 64-bit little-endian ELF file."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            yield Elf(path, content, _sections(path, content))
    except (OSError, ValueError) as error:  # mmap's ValueError: an empty file
        raise EdgekitError(f"{path}: cannot be read: {error}") from None


def damaged(path: Path, what: str) -> EdgekitError:
    """Return the error for a file whose parts contradict one another."""
    return EdgekitError(f"{path}: damaged or cut short: {what}; reinstall the package that it belongs to")


def _sections(path: Path, content: mmap.mmap) -> tuple[Section, ...]:
    if content[:4] != b"\x7fELF" or len(content) < HEADER:
        raise EdgekitError(f"{path}: not an ELF file; expected a shared library of Linux (.so)")
    if content[4:6] != b"\x02\x01":
        raise EdgekitError(f"{path}: not a 64-bit little-endian ELF file; GPU libraries exist for no other machines")
    (table,) = struct.unpack_from("<Q", content, 40)
    size, count, names = struct.unpack_from("<HHH", content, 58)
    if not table:
        raise EdgekitError(f"{path}: its table of sections was stripped, so its GPU code cannot be found")
    if size != SECTION or table + SECTION > len(content):
        raise damaged(path, f"its table of sections begins at {table}, with {size} bytes each")
    first = struct.unpack_from("<IIQQQQIIQQ", content, table)
    count, names = count or first[5], first[6] if names == 0xFFFF else names  # more than 65,279 sections
    if table + count * SECTION > len(content) or names >= count:
        raise damaged(path, f"it says that it has {count} sections, names in section {names}")
    found = []
    for number in range(count):
        name, section_type, _, _, offset, length, link, *_ = struct.unpack_from(
            "<IIQQQQIIQQ", content, table + number * SECTION
        )
        if section_type != NOBITS and offset + length > len(content):
            raise damaged(path, f"section {number} ends at {offset + length}, the file at {len(content)}")
        found.append((name, Section("", section_type, offset, length, link)))
    strings = found[names][1]
    return tuple(
        Section(_string(path, content, strings, name), item.section_type, item.offset, item.size, item.link)
        for name, item in found
    )


def _string(path: Path, content: mmap.mmap, strings: Section, at: int) -> str:
    if strings.section_type == NOBITS or at >= max(strings.size, 1):
        raise damaged(path, f"a name lies at {at} of {strings.size} bytes of names")
    stop = strings.offset + strings.size
    end = content.find(b"\0", strings.offset + at, stop)
    return content[strings.offset + at : end if end >= 0 else stop].decode("utf-8", "replace")
