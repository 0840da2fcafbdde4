"""ELF files written byte by byte: sections, strings at the edges, and numbers that need the long form."""

import struct

import pytest

from edgekit.doctor.elf import NOBITS, SECTION, opened
from edgekit.errors import EdgekitError
from tests.edgekit.doctor.elves import elf


@pytest.fixture
def read(tmp_path):
    """read(content): (name, size) of each section, and the libraries that are needed."""

    def sections_of(content):
        (tmp_path / "lib.so").write_bytes(content)
        with opened(tmp_path / "lib.so") as file:
            return [(item.name, item.size) for item in file.sections], file.needed()

    return sections_of


def table_of(content):
    return int.from_bytes(content[40:48], "little")


def changed(content, section, field, value):
    """The file with a field of a section's entry set: (offset in the entry, format) by name."""
    at, form = {"name": (0, "<I"), "type": (4, "<I"), "offset": (24, "<Q"), "size": (32, "<Q"), "link": (40, "<I")}[
        field
    ]
    place = table_of(content) + section * SECTION + at
    return content[:place] + struct.pack(form, value) + content[place + struct.calcsize(form) :]


def test_sections_have_their_names_and_sizes(read):
    sections, needed = read(elf({".text": b"\x90" * 5, ".data": b"", ".é": b"x"}))
    assert sections[:4] == [("", 0), (".text", 5), (".data", 0), (".é", 1)]
    assert sections[4][0] == ".shstrtab"
    assert needed == ()


def test_libraries_are_in_the_order_of_the_dynamic_section(read):
    names = ("libz.so.1", "liba.so", "libz.so.1", "")
    assert read(elf({}, names))[1] == names


def test_a_dynamic_section_that_ends_inside_an_entry_has_only_the_whole_ones(read):
    """Sections: none, strings, dynamic, names."""
    content = elf({}, ("liba.so", "libb.so"))
    for size, expected in ((32, ("liba.so", "libb.so")), (31, ("liba.so",)), (16, ("liba.so",)), (15, ())):
        assert read(changed(content, 2, "size", size))[1] == expected


def test_a_section_that_takes_no_room_may_be_larger_than_the_file(read):
    """Memory that is zero at the start, .bss."""
    content = changed(elf({".bss": b""}), 1, "size", 2**40)
    with pytest.raises(EdgekitError, match="section 1 ends at"):
        read(content)
    assert read(changed(content, 1, "type", NOBITS))[0][1] == (".bss", 2**40)


def test_a_name_may_be_the_end_of_another_and_must_begin_inside(read):
    content = elf({".rela.text": b"a", ".data": b"b"})  # the names: \0, .rela.text\0, .data\0, ...
    assert read(changed(content, 2, "name", 6))[0][2][0] == ".text"
    size = read(content)[0][-1][1]
    assert read(changed(content, 2, "name", size - 1))[0][2][0] == ""
    with pytest.raises(EdgekitError, match=f"a name lies at {size} of {size} bytes of names"):
        read(changed(content, 2, "name", size))


def test_the_last_name_may_lack_its_end(read):
    """Behind it, in the next section, the letters are others."""
    content = elf({".data": b"b"})
    names = len(read(content)[0]) - 1
    size = read(content)[0][names][1]
    sections, _ = read(changed(content, names, "size", size - 1))
    assert sections[names][0] == ".shstrtab"
    sections, _ = read(changed(content, names, "size", size - 3))
    assert sections[names][0] == ".shstrt"


@pytest.mark.parametrize("link", [4, 99, 2**32 - 1])
def test_strings_in_a_section_that_is_not_there_are_refused(read, link):
    content = elf({}, ("liba.so",))
    with pytest.raises(EdgekitError, match=f"section '.dynamic' has its strings in section {link}"):
        read(changed(content, 2, "link", link))


def test_counts_too_large_for_the_header_are_in_the_first_section(read):
    """From 65,280 sections on: the count is the first section's size, the section of the names its link."""
    content = elf({".text": b"a"}, ("liba.so",))
    count, names = struct.unpack_from("<HH", content, 60)
    long = content[:60] + struct.pack("<HH", 0, 0xFFFF) + content[64:]
    long = changed(changed(long, 0, "size", count), 0, "link", names)
    (_, *sections), needed = read(long)
    (_, *expected), _ = read(content)
    assert sections == expected
    assert needed == ("liba.so",)
    with pytest.raises(EdgekitError, match=f"it says that it has {count} sections, names in section {count}"):
        read(changed(long, 0, "link", count))


def test_the_file_is_closed_afterwards(tmp_path):
    (tmp_path / "lib.so").write_bytes(elf({}))
    with opened(tmp_path / "lib.so") as file:
        assert not file.content.closed
    assert file.content.closed
