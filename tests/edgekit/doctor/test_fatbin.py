"""GPU code lists: files written here byte by byte are read back, and files that lie are refused, quickly."""

import shutil
import subprocess
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.doctor.elf import opened
from edgekit.doctor.fatbin import Code, read
from edgekit.errors import EdgekitError
from tests.edgekit.doctor.elves import MACHINE_CODE, PTX, container, elf, entry

PASCAL = (
    container(entry(MACHINE_CODE, 60), entry(MACHINE_CODE, 61, b"x" * 40), entry(PTX, 61, b".version"))
    + bytes(24)  # padding between containers
    + container(entry(MACHINE_CODE, 70), entry(8, 75))  # an unknown kind is stepped over
)


@pytest.fixture
def library(tmp_path):
    """Return library(content), which writes a file with this content."""

    def write(content: bytes):
        (tmp_path / "lib.so").write_bytes(content)
        return tmp_path / "lib.so"

    return write


def test_every_entry_of_every_container_in_both_sections_is_found(library):
    file = elf(
        {".text": b"\x90" * 8, ".nv_fatbin": PASCAL, "__nv_relfatbin": container(entry(MACHINE_CODE, 86))},
        ("libcudart.so.12", "libc.so.6"),
    )
    assert read(library(file)) == Code((60, 61, 70, 86), (61,), ("libcudart.so.12", "libc.so.6"))


def test_containers_among_other_data_count_and_what_only_looks_like_one_does_not(library):
    data = b"abc\0" + container(entry(MACHINE_CODE, 87)) + b"text" + container(entry(MACHINE_CODE, 61, size=9_999))
    assert read(library(elf({".rodata": data + container(entry(PTX, 70))}))) == Code((87,), (70,))
    assert not read(library(elf({".rodata": PASCAL[:60]})))


def test_code_elsewhere_does_not_count(library):
    assert not read(library(elf({".text": PASCAL})))
    assert not read(library(elf({".nv_fatbin": b"", ".data": b"abc"})))


def test_a_list_that_was_not_walked_to_the_end_would_be_noticed(library):
    """The planted failure: if the second container's magic number is broken, 70 is missing."""
    broken = PASCAL.replace(container(entry(MACHINE_CODE, 70), entry(8, 75))[:4], b"\0\0\0\0")
    assert broken != PASCAL
    assert read(library(elf({".nv_fatbin": broken}))).sms == ()
    second = PASCAL[:-168] + bytes(4) + PASCAL[-164:]
    assert read(library(elf({".nv_fatbin": second}))).sms != (60, 61, 70)


def test_the_interpreter_itself_is_read_as_readelf_reads_it():
    """readelf is an independent reader of real files."""
    readelf, program = shutil.which("readelf"), shutil.which("ls")
    if readelf is None or program is None:
        pytest.skip("no readelf here")
    told = subprocess.run([readelf, "-dSW", program], capture_output=True, text=True, check=True).stdout
    from pathlib import Path

    with opened(Path(program)) as file:
        needed, sections = file.needed(), file.sections
    assert list(needed) == [line.split("[")[1].rstrip("]") for line in told.splitlines() if "(NEEDED)" in line]
    for section in sections[1:]:
        assert any(f" {section.name} " in line and f" {section.size:06x} " in line for line in told.splitlines())


@pytest.mark.parametrize(
    ("code", "runs", "not_on"),
    [
        (Code((60,)), (60, 61), (52, 53, 62, 70)),  # a major version, from the minor upwards; not on Jetsons
        (Code((61,)), (61,), (60, 62)),
        (Code((75, 80, 86)), (75, 80, 86, 89), (61, 70, 72, 87, 90)),
        (Code((89, 90, 120, 121)), (89, 90, 120, 121), (86, 87, 100)),
        (Code((87,)), (87,), (86, 89)),  # an Orin's code is for Orins
        (Code((), (70,)), (70, 72, 75, 87, 120), (61, 62)),  # PTX is compiled by the driver
        (Code((80,), (90,)), (80, 86, 90, 100, 120), (75, 87)),
        (Code((75, 80), (52, 80)), (75, 80, 89, 90, 120), (52, 61, 72)),  # nvcc's default beside the chosen ones
        (Code((52, 75), (52,)), (52, 61, 72, 75, 90), (50,)),
        (Code((), (52,)), (52, 61, 87), (50,)),
        (Code(), (), (61,)),
    ],
)
def test_which_gpus_it_runs_on(code, runs, not_on):
    assert [sm for sm in (*runs, *not_on) if code.runs_on(sm)] == list(runs)


BAD = {
    "not ELF": b"MZ" + bytes(100),
    "empty": b"",
    "32-bit": b"\x7fELF\x01\x01" + bytes(100),
    "header cut": elf({".nv_fatbin": PASCAL})[:40],
    "table cut": elf({".nv_fatbin": PASCAL})[:-10],
    "all but the header cut": elf({".nv_fatbin": PASCAL})[:64],
    "stripped": elf({})[:40] + bytes(8) + elf({})[48:],
    "names in no section": elf({".nv_fatbin": PASCAL}, names_at=77),
    "container longer than its section": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61), size=10_000)}),
    "container of 2**63 bytes": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61), size=2**63)}),
    "container header of 0": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61), header=0)}),
    "container cut": elf({".nv_fatbin": PASCAL[:50]}),
    "container's own header cut": elf({".nv_fatbin": PASCAL[:10]}),
    "entry longer than its container": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61, size=9_999))}),
    "entry of 2**64 - 1 bytes": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61, size=2**64 - 1))}),
    "entry header of 0": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61, size=0, header=0))}),
    "entry header cut": elf({".nv_fatbin": container(entry(MACHINE_CODE, 61), bytes(8))}),
}


def test_a_section_that_ends_after_the_file_is_refused(library):
    """Each section in turn ends after the file; entries of the dynamic section would be read beyond the file's end."""
    whole = elf({".nv_fatbin": PASCAL}, ("libcudart.so.12",))
    table, count = int.from_bytes(whole[40:48], "little"), int.from_bytes(whole[60:62], "little")
    for number in range(count):
        at = table + 64 * number + 32
        size = int.from_bytes(whole[at : at + 8], "little") + len(whole)
        with pytest.raises(EdgekitError, match=f"section {number} ends at"):
            read(library(whole[:at] + size.to_bytes(8, "little") + whole[at + 8 :]))


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_lies_is_refused(library, kind):
    with pytest.raises(EdgekitError, match=r"lib\.so: (damaged|not |cannot be read|its table)") as caught:
        read(library(BAD[kind]))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(EdgekitError, match="cannot be read"):
        read(tmp_path / "none.so")


def test_a_lying_count_of_sections_allocates_nothing(library):
    whole = bytearray(elf({".nv_fatbin": PASCAL}))
    whole[60:62] = (0).to_bytes(2, "little")  # then the count is in the first section's size
    table = int.from_bytes(whole[40:48], "little")
    whole[table + 32 : table + 40] = (2**60).to_bytes(8, "little")
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(EdgekitError, match="damaged"):
        read(library(bytes(whole)))
    assert time.perf_counter() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@settings(max_examples=400, deadline=1000)
@given(st.data())
def test_no_damage_makes_it_hang_or_crash(tmp_path_factory, data):
    """For bytes changed anywhere, or a cut end, the result is a list or a refusal, at once."""
    whole = bytearray(elf({".nv_fatbin": PASCAL}, ("libcudart.so.12",)))
    for _ in range(data.draw(st.integers(1, 6))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.sampled_from((0, 1, 0x7F, 0xFF)))
    whole = whole[: data.draw(st.integers(1, len(whole)))]
    path = tmp_path_factory.getbasetemp() / "damaged.so"
    path.write_bytes(bytes(whole))
    try:
        code = read(path)
    except EdgekitError:
        return
    assert len(code.sms) + len(code.ptx) <= 5
