"""Compiled C as a session: golden outputs, threads, its cache, and what `auto` makes of a machine."""

import hashlib
import json
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from edgekit import plugins
from edgekit.bundle.family import find_family
from edgekit.bundle.format import GOLDEN, model_key, with_files
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import arrays_to_bytes, golden_inputs
from edgekit.errors import EdgekitError
from edgekit.session import open_session
from exporters.c import program
from exporters.c.library import Compiler, Library
from runtimes.sessions import c_session as module
from runtimes.sessions.c_session import CSession
from runtimes.sessions.torch_session import TorchSession
from tests.toys import toy_bundle

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here: apt-get install gcc"
)
MODELS = {
    "plain": toy_bundle(),
    "context": toy_bundle(context=2),
    "pruned": toy_bundle(heads=3, ff_dim=29, context=1),
    "affine": toy_bundle("affine rows"),
    "palette": toy_bundle("palette"),
    "logits": toy_bundle(output="logits"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One cache for this file's tests: each model is compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(folder, monkeypatch):
    monkeypatch.setenv("EDGEKIT_CACHE", str(folder))


@needs_compiler
@pytest.mark.parametrize("bundle", MODELS.values(), ids=MODELS)
def test_golden_outputs(bundle):
    inputs, expected = bundle.golden()
    got = CSession(bundle).run(inputs)
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("rows", [0, 1, 17, 53])
@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3, "chunk": 4}, {"threads": 2}], ids=str)
def test_rows_come_out_the_same_and_in_order(rows, options):
    bundle = MODELS["context"]
    inputs = golden_inputs(bundle.manifest.inputs, rows)
    got = CSession(bundle, **options).run(inputs)["probabilities"]
    assert got.shape == (rows, 5)
    np.testing.assert_allclose(got, TorchSession(bundle).run(inputs)["probabilities"], atol=1e-6)
    strided = {name: np.repeat(array, 2, axis=0)[::2] for name, array in inputs.items()}
    assert np.array_equal(CSession(bundle, **options).run(strided)["probabilities"], got)


@needs_compiler
def test_several_threads_share_a_session():
    bundle = MODELS["context"]
    session = CSession(bundle, threads=2, chunk=3)
    rows = golden_inputs(bundle.manifest.inputs, 400)
    expected = CSession(bundle, threads=1).run(rows)["probabilities"]

    def work(start):
        part = slice(start, start + 40)
        return all(
            np.array_equal(
                session.run({name: array[part] for name, array in rows.items()})["probabilities"], expected[part]
            )
            for _ in range(50)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 400, 40)))


@needs_compiler
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"light_curves": a["light_curve"]}, "unknown input 'light_curves'.*did you mean 'light_curve'"),
        (lambda a: {}, "'light_curve' is missing"),
        (lambda a: a | {"extra": a["context"]}, "unknown input 'extra'"),
        (lambda a: a | {"light_curve": a["light_curve"][:, :5]}, r"shape \(6, 5, 2\); expected \(batch, 12, 2\)"),
        (lambda a: a | {"light_curve": a["light_curve"].astype(float)}, "dtype float64; expected float32"),
        (lambda a: a | {"light_curve": a["light_curve"] * np.float32("nan")}, "NaN"),
        (lambda a: a | {"context": a["context"][:3]}, "differ in batch size"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    session = CSession(MODELS["context"])
    with pytest.raises(EdgekitError, match=message):
        session.run(change(MODELS["context"].golden()[0]))


@needs_compiler
def test_sessions_say_what_they_are():
    session = CSession(MODELS["plain"], threads=1)
    assert session.provider in {f"c ({lanes} lanes)" for lanes in (1, 4, 8, 16)}
    assert session.device == "cpu (1 thread)"
    for name in ("threads", "chunk"):
        with pytest.raises(EdgekitError, match=f"{name} = 0; expected at least 1"):
            CSession(MODELS["plain"], **{name: 0})
    open_session(MODELS["plain"], "c", threads=1, chunk=4).warmup(3)


@needs_compiler
def test_a_model_is_compiled_once_and_again_when_anything_changes(tmp_path, monkeypatch):
    bundle, other = MODELS["plain"], MODELS["context"]
    CSession(bundle, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    compiled = []
    real = Compiler.shared_library
    monkeypatch.setattr(Compiler, "shared_library", lambda *items: compiled.append(1) or real(*items))
    CSession(bundle, cache=tmp_path)
    assert not compiled
    content = path.read_bytes()
    path.unlink()  # and not in place: this process has it mapped
    path.write_bytes(content[: len(content) // 2])
    CSession(bundle, cache=tmp_path).warmup(1)
    assert len(compiled) == 1
    CSession(other, cache=tmp_path)
    monkeypatch.setattr(module, "NATIVE", ("-std=c99", "-O1"))
    CSession(bundle, cache=tmp_path)
    assert len(compiled) == 3
    assert len(list(tmp_path.iterdir())) == 3


@needs_compiler
def test_a_cached_model_needs_no_torch(tmp_path):
    bundle = MODELS["plain"]
    CSession(bundle, cache=tmp_path)
    write_bundle(bundle, tmp_path / "toy.edge")
    program = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from edgekit.bundle.store import open_bundle
from edgekit.session import open_session
open_session(open_bundle(sys.argv[1]), "c", cache=sys.argv[2]).warmup(9)
"""
    command = [sys.executable, "-c", program, tmp_path / "toy.edge", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


TRAP = """
#include <stdio.h>
__attribute__((constructor)) static void sprung(void) { fclose(fopen("%s", "w")); }
"""


@needs_compiler
@pytest.mark.parametrize(
    ("opened", "words"),
    [("file", "the cached file has the mode 0666"), ("folder", "the cache folder has the mode 0777")],
)
def test_a_library_that_others_could_have_written_is_not_loaded(opened, words, tmp_path):
    """The hash at the end of the file is right; it detects damage and proves nothing about the author."""
    folder, sprung = tmp_path / "c", tmp_path / "sprung"
    folder.mkdir(0o700)
    (tmp_path / "trap.c").write_text(TRAP % sprung)
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "trap.c", "-o", tmp_path / "trap.so"], check=True)
    content = (tmp_path / "trap.so").read_bytes()
    evil = folder / f"{module._digest(model_key(MODELS['plain']), Compiler())}.so"
    evil.write_bytes(content + hashlib.sha256(content).digest())
    evil.chmod(0o666 if opened == "file" else 0o600)
    folder.chmod(0o777 if opened == "folder" else 0o700)
    with pytest.raises(EdgekitError, match=words):
        CSession(MODELS["plain"], cache=folder)
    assert not sprung.exists()
    evil.chmod(0o600), folder.chmod(0o700)
    with pytest.raises(EdgekitError, match="not a compiled model"):
        CSession(MODELS["plain"], cache=folder)
    assert sprung.exists(), "the twin: as the user's own file it is loaded"


@pytest.mark.parametrize("command", ["/bin/true", "/bin/false", "/bin/echo"])
def test_a_program_that_is_no_compiler_is_named(command, tmp_path):
    with pytest.raises(EdgekitError, match=rf"{command} .*\$CC") as caught:
        CSession(MODELS["plain"], compiler=command, cache=tmp_path / "c")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not shutil.which("cat"), reason="no cat here")
def test_a_compiler_that_writes_nothing_is_named(tmp_path):
    fake = tmp_path / "fakecc"
    fake.write_text("#!/bin/sh\necho '#define __STDC__ 1'\n")
    fake.chmod(0o755)
    with pytest.raises(EdgekitError, match=r"wrote no file; name another compiler in \$CC"):
        CSession(MODELS["plain"], compiler=str(fake), cache=tmp_path / "c")
    fake.write_text("not a script")
    with pytest.raises(EdgekitError, match=r"cannot be run|is no C compiler"):
        CSession(MODELS["plain"], compiler=str(fake), cache=tmp_path / "c")


@needs_compiler
def test_what_stands_in_the_way_is_named(tmp_path):
    bundle = MODELS["plain"]
    (tmp_path / "file").touch()
    with pytest.raises(EdgekitError, match=r"cannot be kept there.*set \$EDGEKIT_CACHE"):
        CSession(bundle, cache=tmp_path / "file" / "cache")
    foreign = replace(bundle, manifest=replace(bundle.manifest, family="resnet"))
    with pytest.raises(EdgekitError, match=r"unknown model family 'resnet'"):
        CSession(foreign, cache=tmp_path)
    with pytest.raises(EdgekitError, match=r"cannot say what it is|no C compiler"):
        CSession(bundle, compiler="false", cache=tmp_path)


def test_no_compiler_is_an_error_and_onnxruntime_for_auto(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(EdgekitError, match=r"no C compiler: none of cc, gcc, clang is here; install one .*onnxruntime"):
        CSession(MODELS["plain"])
    session = open_session(MODELS["plain"], "auto", threads=1)
    assert session.provider == "CPUExecutionProvider"


@needs_compiler
def test_auto_takes_c_where_it_gives_the_golden_outputs(monkeypatch):
    bundle = MODELS["context"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session = open_session(bundle, "auto", threads=1, chunk=4)
    assert session.provider.startswith("c (")
    real = Library.run

    def off_by_little(self, rows, arrays, workspace):
        real(self, rows, arrays, workspace)
        arrays[-1][...] += 1e-4

    monkeypatch.setattr(Library, "run", off_by_little)
    with pytest.warns(RuntimeWarning, match=r"probabilities is 1.0e-04 from its golden value.*using onnxruntime"):
        session = open_session(bundle, "auto", threads=1)
    assert session.provider == "CPUExecutionProvider"


@needs_compiler
def test_auto_does_not_trust_a_nan():
    bundle = MODELS["plain"]
    inputs, expected = bundle.golden()
    content = {f"in.{name}": array for name, array in inputs.items()}
    content |= {f"out.{name}": array * np.float32("nan") for name, array in expected.items()}
    with pytest.raises(EdgekitError, match="is nan from its golden value"):
        module.check_golden(CSession(bundle), with_files(bundle, {GOLDEN: arrays_to_bytes(content)}))


@needs_compiler
def test_edgekit_run_says_what_ran(edgekit, tiny_file, tiny_bundle, tmp_path):
    inputs, expected = tiny_bundle.golden()
    np.savez(tmp_path / "in.npz", **inputs)
    done = edgekit("run", tiny_file, "--inputs", tmp_path / "in.npz", "--outputs", tmp_path / "out.npz", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["provider"].startswith("c (")
    with np.load(tmp_path / "out.npz") as written:
        np.testing.assert_allclose(written["probabilities"], expected["probabilities"], atol=2e-6)


def test_auto_knows_the_families_of_the_exporter():
    known = {name for name in plugins.names("edgekit.families") if find_family(name).written_in_c}
    assert set(program.WRITERS) == known
