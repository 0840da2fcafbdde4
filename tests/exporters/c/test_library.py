"""Finding a C compiler, reading its reasons, and running what it made."""

import shutil

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from exporters.c import library
from exporters.c.library import NATIVE, PLAIN, Compiler, Library

MODEL = """
#include "model.h"
const char model_key[] = "the key";
const size_t model_workspace = 3;
const int model_lanes = 4;
void model_run(size_t rows, const float *x, float *y, float *workspace) {
    for (size_t k = 0; k < rows; k++) { workspace[0] = x[k]; y[k] = 2 * workspace[0] + 1; }
}
"""
HEADER = "#include <stddef.h>\n"

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, library.COMPILERS)), reason="no C compiler here")


@pytest.fixture
def script(tmp_path):
    """script(name, text): a program of the test's own."""

    def write(name, text):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
        return str(tmp_path / name)

    return write


def test_the_compiler_is_the_one_named_then_that_of_cc_then_the_first_that_is_here(script, monkeypatch, tmp_path):
    named, chosen, found = (script(name, "echo it") for name in ("named", "chosen", "gcc"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", chosen)
    assert Compiler(named).path == named
    assert Compiler().path == chosen
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert Compiler().path == found
    monkeypatch.delenv("CC")
    assert Compiler().path == found


def test_without_a_compiler_all_that_were_looked_for_are_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "tcc")
    with pytest.raises(
        EdgekitError, match=r"none of tcc, cc, gcc, clang is here; .*\$CC, or use the runtime onnxruntime"
    ):
        Compiler()
    with pytest.raises(EdgekitError, match="none of icc is here"):
        Compiler("icc")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo 'In file a.c:' >&2; echo 'a.c:1: error: no such thing' >&2; exit 1", "a.c:1: error: no such thing"),
        ("echo 'killed' >&2; echo 'more' >&2; exit 1", "killed"),
        ("exit 3", "exit status 3"),
    ],
)
def test_the_reason_of_a_compiler_that_fails_is_one_line(script, text, reason):
    with pytest.raises(EdgekitError, match=f"cannot compile the model: {reason}; name another") as caught:
        Compiler(script("failing", text)).shared_library(MODEL, HEADER, PLAIN)
    assert "\n" not in str(caught.value)


def test_the_version_is_the_first_line(script):
    assert Compiler(script("cc", "echo gcc 99; echo 'free software'")).version() == "gcc 99"


@needs_compiler
@pytest.mark.parametrize("flags", [PLAIN, NATIVE])
def test_what_was_compiled_runs_and_says_what_it_is(flags, tmp_path):
    (tmp_path / "model.so").write_bytes(Compiler().shared_library(MODEL, HEADER, flags))
    compiled = Library(tmp_path / "model.so")
    assert (compiled.key, compiled.workspace, compiled.lanes) == ("the key", 3, 4)
    x, y = np.arange(5, dtype=np.float32), np.full(5, -1, np.float32)
    compiled.run(4, (x, y), np.empty(compiled.workspace, np.float32))
    assert y.tolist() == [1.0, 3.0, 5.0, 7.0, -1.0]


@needs_compiler
def test_a_mistake_in_the_model_is_quoted():
    with pytest.raises(EdgekitError, match="error"):
        Compiler().shared_library(MODEL.replace("2 * workspace", "2 * nothing"), HEADER, PLAIN)


@needs_compiler
def test_a_larger_model_is_a_larger_object():
    table = "const float table[1000] = {1};"
    small, large = (Compiler().object_size(MODEL + more, HEADER, PLAIN) for more in ("", table))
    assert 4000 <= large - small < 5000


@needs_compiler
def test_macros_tell_the_instructions_of_this_machine_from_the_baseline():
    plain, native = (set(Compiler().macros(flags).splitlines()) for flags in (PLAIN, NATIVE))
    assert any("__VERSION__" in line for line in plain)
    assert "#define __OPTIMIZE__ 1" in plain & native
