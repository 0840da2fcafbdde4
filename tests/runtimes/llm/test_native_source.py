"""The C of the native engine on other machines, and under the sanitizers of the compiler."""

import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from runtimes.llm.engine import Item
from runtimes.llm.native_engine import FLAGS, NativeEngine, source_of
from tests.runtimes.llm.conftest import compiler

IDS = np.random.default_rng(7).integers(0, 300, 90)
# programs that run all kernels, and a whole engine, on numbers from a generator, and print a hash of the results
KERNELS, ENGINE = ((Path(__file__).parent / f"check_{name}.c").read_text() for name in ("kernels", "engine"))


def step_on(engine):
    with closing(engine):
        return engine.step([Item(0, IDS, logits="all")])[0], engine.lanes


@pytest.mark.machines
@compiler
@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_plain_c_and_avx2_give_the_same_bits_as_this_machine(toy, form, kv):
    model = toy("qwen3", form)
    expected, own = step_on(NativeEngine(model, blocks=8, kv=kv))
    plain, name = step_on(NativeEngine(model, blocks=8, kv=kv, flags=("-DPLAIN_C",)))
    assert name == "plain C"
    assert np.array_equal(plain, expected)
    if own == "AVX-512 VNNI":
        narrow, name = step_on(NativeEngine(model, blocks=8, kv=kv, flags=("-mavx2", "-mfma", "-mf16c")))
        assert name == "AVX2"
        assert np.array_equal(narrow, expected)


def check_program(source, main, tmp_path, command, flags, run_with=()):
    """Compile the engine's source with a program that prints a hash of its results, and run it."""
    path, program = tmp_path / "check.c", tmp_path / "check"
    path.write_text(source + main)
    subprocess.run([command, *FLAGS, *flags, str(path), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([*run_with, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:1000]  # sanitizers say first what they have found
    lanes, _, digest = done.stdout.strip().rpartition(" ")
    return lanes, digest


@pytest.mark.machines
@compiler
def test_kernels_hash_alike_in_plain_c_and_with_vectors(toy, tmp_path):
    source = source_of(toy("llama", "Q4_0").architecture)
    for program in (KERNELS, ENGINE):
        plain = check_program(source, program, tmp_path, "cc", ["-DPLAIN_C"])[1]
        assert check_program(source, program, tmp_path, "cc", ["-march=native"])[1] == plain
        # a compiler that may contract a product and a sum rounds otherwise, and the hash shows it
        fast = ["-march=native", "-ffast-math", "-U__FAST_MATH__"]
        assert check_program(source, program, tmp_path, "cc", fast)[1] != plain


@pytest.mark.machines
@pytest.mark.skipif(
    not all(map(shutil.which, ("aarch64-linux-gnu-gcc", "qemu-aarch64"))),
    reason="no compiler and emulator of 64-bit ARM here: apt-get install gcc-aarch64-linux-gnu qemu-user",
)
@pytest.mark.parametrize(("flags", "name"), [([], "NEON"), (["-march=armv8.2-a+dotprod"], "NEON dot product")])
def test_neon_hashes_like_plain_c(toy, tmp_path, flags, name):
    source, emulator = source_of(toy("llama", "Q4_0").architecture), ["qemu-aarch64", "-cpu", "max"]
    flags = [*flags, "-static"]
    for program in (KERNELS, ENGINE):
        expected = check_program(source, program, tmp_path, "cc", ["-DPLAIN_C"])[1]
        assert check_program(source, program, tmp_path, "aarch64-linux-gnu-gcc", flags, emulator) == (name, expected)


SANITIZED = ("-DALLOCATE_EXACTLY", "-g", "-O1", "-march=native")


@pytest.mark.machines
@compiler
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
@pytest.mark.parametrize(
    "sizes", [{}, {"head_size": 80, "heads": 7, "kv_heads": 1}, {"head_size": 16, "heads": 4}], ids=str
)
def test_the_sanitizers_find_nothing(toy, tmp_path, sanitizer, sizes):
    flags = [*SANITIZED, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    built = subprocess.run(["cc", *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False)
    if built.returncode or subprocess.run([tmp_path / "probe"], capture_output=True, check=False).returncode:
        pytest.skip("this compiler comes without the sanitizers' libraries, or they do not run here")
    source = source_of(toy("llama", "F32", **sizes).architecture)
    for program in (KERNELS, ENGINE):
        plain = check_program(source, program, tmp_path, "cc", ["-DPLAIN_C"])
        assert check_program(source, program, tmp_path, "cc", flags)[1] == plain[1]


@pytest.mark.machines
@compiler
@pytest.mark.parametrize(
    ("sanitizer", "defect", "problem"),
    [
        ("address", ("(size_t)of->most_length + 2 * BLOCK)", "0)"), "AddressSanitizer"),
        ("thread", ("    wait_for_all(barrier);\n    store_rows", "    store_rows"), "ThreadSanitizer"),
    ],
)
def test_the_sanitizers_find_a_planted_defect(toy, tmp_path, sanitizer, defect, problem):
    source = source_of(toy("llama", "F32").architecture)
    assert source.count(defect[0]) == 1
    flags = [*SANITIZED, f"-fsanitize={sanitizer}"]
    first = ["env", "TSAN_OPTIONS=halt_on_error=1"]  # the first report is enough: a race has thousands of them
    with pytest.raises(AssertionError, match=problem):
        check_program(source.replace(*defect), ENGINE, tmp_path, "cc", flags, first)
