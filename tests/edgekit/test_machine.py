"""The description of the machine."""

import pytest

from edgekit import machine


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model name : A\nflags : fpu avx2 avx512_vnni\n", "vnni"),
        ("model name : A\nflags : fpu avx2 avx_vnni\n", "vnni"),
        ("model name : A\nflags : fpu avx2 avx512f\n", "saturating"),
        ("Features : fp asimd asimddp\n", "vnni"),
        ("no such line\n", "unknown"),
    ],
)
def test_how_it_multiplies_int8(text, kind, tmp_path):
    (tmp_path / "cpuinfo").write_text(text)
    assert machine.int8_products(tmp_path / "cpuinfo") == kind
    assert machine.int8_products(tmp_path / "absent") == "unknown"


def test_memory_within_a_container(tmp_path):
    assert machine.memory_bytes(tmp_path) == (0, 0)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemFree: 1 kB\nMemAvailable:    800 kB\n")
    assert machine.memory_bytes(tmp_path) == (1024_000, 819_200)
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("100000\n")
    assert machine.memory_bytes(tmp_path) == (500_000, 400_000)
    (group / "memory.stat").write_text("anon 40000\nfile_mapped 1\nfile 60000\n")
    assert machine.memory_bytes(tmp_path) == (500_000, 460_000), "what was read from files can be dropped"
    (group / "memory.max").write_text("max\n")
    assert machine.memory_bytes(tmp_path) == (1024_000, 819_200)
