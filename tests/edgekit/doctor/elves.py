"""Write minimal ELF files with GPU code, byte by byte from the two formats' descriptions, for tests to damage."""

import struct

MACHINE_CODE, PTX = 2, 1
DYNAMIC, STRINGS, PROGBITS, NOBITS = 6, 3, 1, 8


def entry(kind: int, sm: int, payload: bytes = b"code" * 4, *, size: int | None = None, header: int = 64) -> bytes:
    """Return one piece of code in a container; `size` and `header` may be wrong."""
    size = len(payload) if size is None else size
    return struct.pack("<HHIQIIHHI", kind, 0x101, header, size, 0, 0, 7, 1, sm).ljust(64, b"\0") + payload


def container(*entries: bytes, size: int | None = None, header: int = 16) -> bytes:
    body = b"".join(entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, header, len(body) if size is None else size) + body


def elf(sections: dict[str, bytes], needed: tuple[str, ...] = (), *, names_at: int | None = None) -> bytes:
    """Return a 64-bit file of these sections; `needed` libraries make a dynamic section and its strings."""
    every = [("", 0, b"", 0), *((name, PROGBITS, content, 0) for name, content in sections.items())]
    if needed:
        strings, tags = b"\0", b""
        for name in needed:
            tags += struct.pack("<qQ", 1, len(strings))
            strings += name.encode() + b"\0"
        every += [(".dynstr", STRINGS, strings, 0), (".dynamic", DYNAMIC, tags + bytes(16), len(every))]
    names, offsets = b"", []
    for name in [*(item[0] for item in every), ".shstrtab"]:
        offsets.append(len(names))
        names += name.encode() + b"\0"
    every.append((".shstrtab", STRINGS, names, 0))
    content, table = b"", b""
    for (_, kind, body, link), name in zip(every, offsets, strict=True):
        table += struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, 64 + len(content), len(body), link, 0, 8, 0)
        content += body
    last = len(every) - 1 if names_at is None else names_at
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, 64 + len(content), 0, 64, 0, 0, 64, len(every), last
    )
    return header + content + table
