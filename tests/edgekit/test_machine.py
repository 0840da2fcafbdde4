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
