"""tools/check_sm_lists.py, on a wheel made here."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.edgekit.doctor.elves import MACHINE_CODE, PTX, container, elf, entry

TOOL = Path(__file__).parents[3] / "tools/check_sm_lists.py"


@pytest.fixture
def wheel(tmp_path):
    """Return a wheel with two libraries that have code, one of them for Pascal; a library without code; and a text."""
    path = tmp_path / "made-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "a/libold.so.9", elf({".nv_fatbin": container(entry(MACHINE_CODE, 61), entry(MACHINE_CODE, 75))})
        )
        archive.writestr("a/libnew.so", elf({".nv_fatbin": container(entry(MACHINE_CODE, 75), entry(PTX, 75))}))
        archive.writestr("a/libplain.so", elf({}))
        archive.writestr("a/readme.so.txt", "no library")
    return path


def run(*arguments):
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_a_wheel(wheel):
    done = run(wheel)
    assert done.returncode == 0, done.stderr
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["made-1.0-py3-none-any.whl"],
        ["libnew.so", "sm", "75,", "PTX", "75"],
        ["libold.so.9", "sm", "61", "75"],
        ["all", "sm", "61", "75,", "PTX", "75"],
    ]
    assert run(wheel, "--sm", 75).returncode == 0
    done = run(wheel, "--sm", 61)
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines() if "NOT FOR sm_61" in line] == ["libnew.so"]


def test_a_damaged_library_is_one_line(tmp_path):
    (tmp_path / "lib.so").write_bytes(b"nothing")
    done = run(tmp_path / "lib.so")
    assert done.returncode == 1
    assert done.stderr.startswith("edgekit: ")
    assert "not an ELF file" in done.stderr
