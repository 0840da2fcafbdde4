"""The machine itself, from records: where a warning begins, and for whom it is none."""

import pytest

from edgekit.doctor.host import FEW, compiler, cpu, memory
from edgekit.doctor.system import Blas, Cpu, Jetson, System

GB = 10**9
MODERN = ("avx2", "avx512f", "avx512_vnni")


def system(**changes):
    return System(**({"machine": "x86_64"} | changes))


def found(check, **changes):
    """(part, status) of each finding."""
    return [(item.name, item.status) for item in check(system(**changes))]


@pytest.mark.parametrize(
    ("whole", "free", "status"),
    [
        (16 * GB, 1.6 * GB, "ok"),
        (16 * GB, 1.6 * GB - 1, "warning"),
        (2 * GB, FEW, "ok"),
        (2 * GB, FEW - 1, "warning"),
        (2 * GB, 0.3 * GB, "warning"),
    ],
)
def test_free_memory_is_a_tenth_and_at_least_enough_for_a_program(whole, free, status):
    assert found(memory, memory=whole, available=free) == [("memory", status)]


def test_memory_that_nobody_could_tell_is_no_finding():
    assert found(memory) == []


def test_on_a_jetson_the_memory_is_shared_and_the_desktop_can_go():
    (finding,) = memory(system(memory=8 * GB, available=0.1 * GB, jetson=Jetson()))
    assert finding.finding == "100.0 MB of 8.0 GB free, shared with the GPU"
    assert "isolate multi-user.target" in finding.remedy
    (elsewhere,) = memory(system(memory=8 * GB, available=0.1 * GB))
    assert "multi-user.target" not in elsewhere.remedy


@pytest.mark.parametrize(
    ("machine", "flags", "status", "words"),
    [
        ("x86_64", ("sse4_2",), "warning", "without AVX2"),
        ("x86_64", ("avx2",), "ok", "no VNNI: int8 products of the scheme u8s8 saturate"),
        ("x86_64", ("avx2", "avx512f"), "ok", "no VNNI"),
        ("x86_64", ("avx2", "avx_vnni"), "ok", "avx2, avx_vnni"),
        ("x86_64", MODERN, "ok", "avx2, avx512f, avx512_vnni"),
        ("aarch64", ("asimd", "asimddp"), "ok", "asimd, asimddp"),
        ("aarch64", ("fp",), "ok", "no vector instructions that edgekit knows"),
    ],
)
def test_what_the_processor_can(machine, flags, status, words):
    (finding,) = cpu(system(machine=machine, cpu=Cpu(flags=flags)))
    assert finding.status == status
    assert words in finding.finding


def test_a_processor_with_vnni_is_not_told_that_it_has_none():
    for flags in (MODERN, ("avx2", "avx_vnni")):
        (finding,) = cpu(system(cpu=Cpu(flags=flags)))
        assert "saturate" not in finding.finding


def test_a_processor_that_nobody_could_ask_is_no_finding():
    assert found(cpu) == []


@pytest.mark.parametrize(
    ("kernel", "flags", "environment", "status"),
    [
        ("Haswell", MODERN, {}, "warning"),
        ("Zen", MODERN, {}, "warning"),
        ("SkylakeX", MODERN, {}, "ok"),
        ("Haswell", ("avx2",), {}, "ok"),
        ("Haswell", MODERN, {"OPENBLAS_CORETYPE": "Haswell"}, "ok"),
    ],
)
def test_openblas_with_kernels_of_an_older_processor(kernel, flags, environment, status):
    changes = {"cpu": Cpu(flags=flags), "environment": environment}
    changes["blas"] = (Blas("openblas", "0.3.30", kernel), Blas("mkl", "2024", kernel))
    assert found(cpu, **changes)[1:] == [("BLAS", status), ("BLAS", "ok")]


def test_a_compiler_is_optional_but_missed():
    assert found(compiler, compiler="gcc 12.2") == [("compiler", "ok")]
    (finding,) = compiler(system())
    assert finding.status == "warning"
    assert "apt-get install gcc" in finding.remedy
