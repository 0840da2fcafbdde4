"""The exported C: the network's numbers on every instruction set, and an export that carries its own proof."""

import functools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.bundle import zoo
from edgekit.bundle.family import find_family
from edgekit.bundle.format import GOLDEN, assemble, with_files
from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import arrays_to_bytes, golden_inputs
from edgekit.errors import EdgekitError
from edgekit.graph.network import Network
from edgekit.importers.files import resolve
from edgekit.passes.base import Candidate
from edgekit.passes.quantize import Quantize
from exporters.c import source as source_module
from exporters.c.library import NATIVE, PLAIN, Compiler, Library
from exporters.c.program import Buffer, program
from exporters.c_export import CExporter
from tests.conftest import TINY

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here: apt-get install gcc"
)
STRICT = ("-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-pedantic")
SCALAR = ("-O2", "-U__SSE2__", "-U__AVX__", "-U__AVX512F__", "-U__ARM_NEON")  # what a compiler without vectors sees
ODD = {"heads": 3, "head_dim": 3, "ff_dim": 37, "embed_dim": 17, "sequence": 19, "bands": 3, "context": 2}
MODELS = {
    "plain": {},
    "context": {"context": 2},
    "three layers": {"layers": 3},
    "as pruned": {"heads": 5, "ff_dim": 50, "context": 3},
    "all odd": ODD,
    "wide heads": {"heads": 2, "head_dim": 8, "sequence": 40},
    "one step": {"sequence": 1},
}


def compiled(source, folder, flags=STRICT) -> Library:
    path = folder / f"{abs(hash((source.model, flags)))}.so"
    path.write_bytes(shared_library(source.model, source.header, flags))
    return Library(path)


@functools.cache
def shared_library(model: str, header: str, flags: tuple[str, ...]) -> bytes:
    """The library, compiled once for all tests here that load the same source."""
    return Compiler().shared_library(model, header, flags)


def run(library, bundle, inputs, batch=None) -> np.ndarray:
    """Return the outputs of the model. The workspace holds NaN at first, which would appear if the code read memory
    before it wrote to it."""
    rows = len(next(iter(inputs.values())))
    output = np.full((rows, *bundle.manifest.outputs[0].shape[1:]), np.nan, np.float32)
    workspace = np.full(library.workspace, np.nan, np.float32)
    for start in range(0, rows, batch or max(rows, 1)):
        part = slice(start, start + batch if batch else rows)
        library.run(len(output[part]), [*(array[part] for array in inputs.values()), output[part]], workspace)
    return output


def network(bundle, inputs, dtype=torch.float64) -> np.ndarray:
    with torch.inference_mode():
        rows = [torch.from_numpy(array).to(dtype) for array in inputs.values()]
        return Network(bundle).eval().to(dtype)(*rows)[0].numpy()


@pytest.mark.parametrize("arguments", MODELS.values(), ids=MODELS)
def test_any_shape_gives_the_networks_outputs_without_a_warning(toy, tmp_path, arguments):
    bundle = toy(**arguments)
    library = compiled(CExporter().source(bundle), tmp_path)
    for rows in (0, 1, 17):
        inputs = golden_inputs(bundle.manifest.inputs, rows)
        got = run(library, bundle, inputs)
        assert got.shape == (rows, 5)
        np.testing.assert_allclose(got, network(bundle, inputs) if rows else got, atol=1e-6)
        assert np.array_equal(got, run(library, bundle, inputs, batch=1))


@pytest.mark.parametrize("encoding", ["affine rows", "affine", "palette"])
@pytest.mark.parametrize("arguments", [{"layers": 2}, ODD], ids=["two layers", "all odd"])
def test_encoded_weights_are_stored_as_codes(toy, tmp_path, arguments, encoding):
    bundle = toy(encoding, **arguments)
    source = CExporter(weights="encoded").source(bundle)
    inputs, expected = bundle.golden()
    library = compiled(source, tmp_path)
    np.testing.assert_allclose(run(library, bundle, inputs), expected["probabilities"], atol=1e-6)
    assert np.array_equal(  # decoding is exact
        run(library, bundle, inputs), run(compiled(CExporter().source(bundle), tmp_path), bundle, inputs)
    )
    for name, encoding in bundle.encodings().items():
        assert re.search(rf"const u?int8_t {name.replace('.', '_')}__codes\[{encoding.codes.size}\]", source.model)


@pytest.mark.parametrize("bits", [8, 4])
def test_what_quantize_leaves_is_stored_in_bytes_and_proved(bits, tiny_bundle, tiny_context, tmp_path):
    """The test goes from the compression pass to the check on the device: the file holds int8, which each call decodes
    to float32."""
    found = Quantize(bits=bits, epochs=0).apply(Candidate("t2", TINY, tiny_bundle.model()), tiny_context)
    inputs, expected = tiny_bundle.golden()
    empty = assemble(tiny_bundle.manifest, found.weights(), found.encodings, (inputs, expected))
    exact = network(empty, inputs, torch.float32)
    assert np.abs(exact - expected["probabilities"]).max() > 1e-5, "as it was before"
    bundle = assemble(tiny_bundle.manifest, found.weights(), found.encodings, (inputs, {"probabilities": exact}))
    export = CExporter(weights="encoded").export(bundle, tmp_path / "out")
    text = (tmp_path / "out" / "model.c").read_text()
    for name, encoding in found.encodings.items():
        table = re.search(rf"const int8_t {name.replace('.', '_')}__codes\[\d+\] = \{{([^}}]*)\}}", text)
        codes = np.array(table[1].split(","), int)
        assert np.array_equal(codes, encoding.codes.ravel())
        assert np.abs(codes).max() == 2 ** (bits - 1) - 1
        assert f"const float {name.replace('.', '_')}_[" not in text, "and not as float32 beside it"
    assert max(check["difference"] for check in export.checks) < 2e-6
    assert check_device(tmp_path / "out").returncode == 0


def test_codes_make_the_object_file_smaller(toy):
    bundle = toy("palette", ff_dim=128)
    codes = sum(encoding.codes.size for encoding in bundle.encodings().values())
    sizes = [
        Compiler().object_size(source.model, source.header, PLAIN)
        for source in (CExporter(weights=weights).source(bundle) for weights in ("float32", "encoded"))
    ]
    assert sizes[0] - sizes[1] > 2.5 * codes


def test_probabilities_are_softmaxed_and_logits_are_not(toy, tmp_path):
    bundle = toy(output="logits")
    source = CExporter().source(bundle)
    inputs, expected = bundle.golden()
    np.testing.assert_allclose(run(compiled(source, tmp_path), bundle, inputs), expected["logits"], atol=2e-6)
    assert "USES_SOFTMAX\n" not in source.model.partition("#include")[0]


WRITTEN_IN_C = [name for name in zoo.folders() if find_family(resolve(name).manifest.family).written_in_c]


@pytest.mark.parametrize("name", WRITTEN_IN_C)
def test_the_zoo_is_as_near_to_float64_as_torch_itself(name, tmp_path):
    """This also holds if attention scores reach thousands."""
    bundle = resolve(name)
    library = compiled(CExporter().source(bundle), tmp_path, NATIVE)
    inputs, expected = bundle.golden()
    np.testing.assert_allclose(run(library, bundle, inputs), expected["probabilities"], atol=5e-6)
    rng = np.random.default_rng(0)
    for scale in (1.0, 30.0):
        shapes = {spec.name: (40, *spec.shape[1:]) for spec in bundle.manifest.inputs}
        inputs = {key: (scale * rng.standard_normal(shape)).astype(np.float32) for key, shape in shapes.items()}
        exact = network(bundle, inputs)
        noise = np.abs(network(bundle, inputs, torch.float32) - exact).max()
        assert np.abs(run(library, bundle, inputs) - exact).max() <= max(2e-6, noise)


@pytest.fixture(scope="module")
def real_model():
    """A model whose scores reach hundreds, inputs of it, and its outputs in float64."""
    bundle = resolve("t2-gr")
    inputs = {
        spec.name: np.random.default_rng(0).standard_normal((300, *spec.shape[1:])).astype(np.float32)
        for spec in bundle.manifest.inputs
    }
    return bundle, inputs, network(bundle, inputs)


@pytest.mark.parametrize("flags", [NATIVE, PLAIN, ("-O2", *SCALAR)], ids=["native", "plain", "scalar"])
def test_queries_and_keys_are_summed_in_double(real_model, tmp_path, flags):
    """The planted failure sums in float32, like every other layer."""
    bundle, inputs, exact = real_model
    source = CExporter().source(bundle)
    text, count = re.subn(
        r"dense_in_double\((\w+_), (\w+_), (\w+_), (\w+_), (\d+), (\d+)\);",
        r"dense(\1, \2, \3, \4, NULL, \5, \6, 0);",
        source.model,
    )
    assert count == 2
    off, single = (
        run(compiled(item, tmp_path, flags), bundle, inputs) - exact for item in (source, replace(source, model=text))
    )
    assert np.abs(off).max() < 1e-6
    assert np.sqrt(np.square(off).mean()) < 0.6 * np.sqrt(np.square(single).mean())


def test_every_instruction_set_gives_the_same(toy, tmp_path):
    bundle = toy("palette", **ODD)
    inputs, expected = bundle.golden()
    source = CExporter(weights="encoded").source(bundle)
    lanes = []
    native = Compiler().macros(NATIVE)
    half = [(*STRICT, *flags) for flags in (("-mavx",), ("-mavx2", "-mfma")) if "__AVX2__" in native]
    for flags in (NATIVE, PLAIN, (*STRICT, *SCALAR), ("-std=gnu17", "-O0", "-march=native"), *half):
        library = compiled(source, tmp_path, flags)
        lanes.append(library.lanes)
        np.testing.assert_allclose(run(library, bundle, inputs), expected["probabilities"], atol=1e-6, err_msg=flags)
    assert lanes[2] == 1
    assert lanes[0] >= lanes[1] >= 4 or "x86" not in native
    assert lanes[0] == 16 or "__AVX512F__" not in native
    assert lanes[4:] == [8] * len(half)


@pytest.mark.skipif(
    not all(map(shutil.which, ("aarch64-linux-gnu-gcc", "qemu-aarch64"))),
    reason="no compiler and emulator of 64-bit ARM here: apt-get install gcc-aarch64-linux-gnu qemu-user",
)
def test_neon_gives_the_same(toy, tmp_path):
    bundle = toy("palette", **ODD)
    source = CExporter(weights="encoded").source(bundle)
    (tmp_path / "model.c").write_text(source.model)
    (tmp_path / "model.h").write_text(source.header)
    inputs, expected = bundle.golden()
    for wanted, golden in ((0, expected), (1, {"probabilities": expected["probabilities"][::-1].copy()})):
        (tmp_path / "check.c").write_text(source_module.write_check(program(bundle), inputs, golden, 1e-6))
        command = ["aarch64-linux-gnu-gcc", *STRICT, "-O2", "-static", "model.c", "check.c", "-o", "check", "-lm"]
        subprocess.run(command, cwd=tmp_path, check=True)
        done = subprocess.run(["qemu-aarch64", tmp_path / "check"], capture_output=True, text=True, check=False)
        assert done.returncode == wanted, done.stdout + done.stderr
        assert "4 lanes" in done.stdout


def test_fast_math_is_refused(toy):
    source = CExporter().source(toy())
    with pytest.raises(EdgekitError, match="compile without it"):
        Compiler().shared_library(source.model, source.header, ("-std=c99", "-O2", "-ffast-math"))


@pytest.mark.parametrize("encoding", ["affine rows", "palette"])
def test_nothing_is_touched_outside_arrays_and_nothing_is_undefined(toy, tmp_path, encoding):
    bundle = toy(encoding, **ODD)
    source = CExporter(weights="encoded").source(bundle)
    (tmp_path / "model.c").write_text(source.model)
    (tmp_path / "model.h").write_text(source.header)
    (tmp_path / "check.c").write_text(source_module.write_check(program(bundle), *bundle.golden(), 1e-6))
    command = [
        Compiler().path,
        *STRICT,
        "-O0",
        "-march=native",
        "-g",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "model.c",
        "check.c",
        "-o",
        "check",
        "-lm",
    ]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip("this compiler comes without the sanitizers' libraries")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("PASS\n")


@pytest.mark.parametrize("arguments", [{}, ODD, {"layers": 3}], ids=["plain", "all odd", "three layers"])
def test_buffers_in_use_do_not_overlap(toy, arguments):
    calls = program(toy(**arguments))
    offsets, size = source_module._offsets(calls)
    last = {
        item.name: time for time, call in enumerate(calls.calls) for item in call.arguments if isinstance(item, Buffer)
    }
    live: dict[str, range] = {}
    for time, call in enumerate(calls.calls):
        for item in call.arguments:
            if isinstance(item, Buffer):
                live[item.name] = range(offsets[item.name], offsets[item.name] + item.features * calls.stride)
        spans = sorted((span.start, span.stop) for span in live.values())
        assert all(one[1] <= other[0] for one, other in pairwise(spans)), (call.kernel, live)
        assert all(end <= size for _, end in spans)
        live = {name: span for name, span in live.items() if last[name] > time}


def check_device(out: Path, *options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, out / "verify.py", *options], capture_output=True, text=True, check=False)


def test_an_export_carries_its_proof_and_a_changed_weight_fails_it(toy, tmp_path):
    out = tmp_path / "out"
    bundle = toy("palette")
    export = CExporter(weights="encoded").export(bundle, out)
    assert set(export.files) == {path.name for path in out.iterdir()}
    assert [(check["batch"], check["changed"]) for check in export.checks] == [(1, 0), (16, 0), (1000, 0)] * 2
    assert [build["flags"] for build in export.manifest["builds"]] == [" ".join(NATIVE), " ".join(PLAIN)]
    assert export.manifest["bundle"] == bundle.digest
    done = check_device(out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 4

    text = (out / "model.c").read_text()
    changed, count = re.subn(r"(classifier_bias_\[5\] = \{\s+)\S+,", r"\g<1>0.5f,", text)
    assert count == 1
    (out / "model.c").write_text(changed)
    done = check_device(out)
    assert done.returncode == 1
    assert "model.c: missing, or not the file that was exported" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"]["model.c"]  # even when the hash is not there to tell
    (out / "manifest.json").write_text(json.dumps(manifest))
    done = check_device(out, "--flags=-O1")
    assert done.returncode == 1
    assert done.stdout.count("WRONG") == 2
    done = check_device(out, "--compiler", "no-such-compiler")
    assert done.returncode == 1
    assert "looked for no-such-compiler" in done.stdout


def test_wrong_golden_outputs_and_wrong_kernels_are_not_exported(toy, tmp_path, monkeypatch):
    bundle = toy()
    inputs, expected = bundle.golden()
    named = {f"in.{name}": array for name, array in inputs.items()}
    content = arrays_to_bytes(named | {"out.probabilities": expected["probabilities"][::-1]})
    with pytest.raises(EdgekitError, match=r"batch 1: .* golden outputs by [1-9].*Nothing was written"):
        CExporter().export(with_files(bundle, {GOLDEN: content}), tmp_path / "out")

    (tmp_path / "kernels").mkdir()
    for file in ("kernels.c", "check.c", "device_check.py"):
        text = (source_module.FOLDER / file).read_text()
        (tmp_path / "kernels" / file).write_text(text.replace("relu ? larger", "0 ? larger"))
    monkeypatch.setattr(source_module, "FOLDER", tmp_path / "kernels")
    with pytest.raises(EdgekitError, match=r"differ from the network's by [1-9].*allowed 1.0e-05"):
        CExporter().export(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_named(toy, tmp_path, monkeypatch):
    bundle = toy()
    foreign = replace(bundle, manifest=replace(bundle.manifest, family="module"))
    with pytest.raises(EdgekitError, match=r"is a module.*knows the families t2.*--to onnx"):
        CExporter().export(foreign, tmp_path / "out")
    renamed = tuple(replace(spec, name="Light curve") for spec in bundle.manifest.inputs)
    with pytest.raises(EdgekitError, match="'Light curve' cannot be a name in C"):
        CExporter().source(replace(bundle, manifest=replace(bundle.manifest, inputs=renamed)))
    wider = tuple(replace(spec, shape=("batch", 12, 3)) for spec in bundle.manifest.inputs)
    with pytest.raises(EdgekitError, match=r"\[\(12, 3\)\].*are not those of its network, \[\(12, 2\)\]"):
        CExporter().source(replace(bundle, manifest=replace(bundle.manifest, inputs=wider)))
    with pytest.raises(EdgekitError, match="'int8'; expected 'encoded' or 'float32'"):
        CExporter(weights="int8")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "tcc")
    with pytest.raises(EdgekitError, match=r"no C compiler: none of tcc, cc, gcc, clang is here; .*apt-get install"):
        CExporter().export(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_writes_codes_and_refuses_what_means_nothing_to_c(edgekit, toy, tmp_path):
    write_bundle(toy("palette"), tmp_path / "toy.edge")
    export = ("export", tmp_path / "toy.edge", "--to", "c", "-o", tmp_path / "out")
    done = edgekit(*export, "--weights", "encoded", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["manifest"]["weights"] == "encoded"
    assert edgekit(*export, "--opset", "17").failed_with(2, "--opset means nothing to the format c")
    assert edgekit(*export, "--weights", "int8").failed_with(1, "'int8'", "expected 'encoded' or 'float32'")


@pytest.mark.parametrize(
    "attack", ['*/ int evil = system("true"); /*', "x\n*/int evil;/*", "*\\\n/ int evil; /*", "??/\n*/ int evil;"]
)
def test_text_from_a_bundle_cannot_become_code(toy, tmp_path, attack):
    """A name or a unit that ends its comment would be compiled and run by whoever opens the bundle."""
    bundle = toy()
    inputs = tuple(replace(spec, unit="x") for spec in bundle.manifest.inputs)
    for spec in inputs:
        object.__setattr__(spec, "unit", attack)  # reading a bundle refuses some of these already
    hostile = replace(bundle, manifest=replace(bundle.manifest, name=attack, inputs=inputs))
    source = CExporter().source(hostile)
    for text in (source.model, source.header):
        assert "evil" in text, "the attack is not in the file: the test shows nothing"
        code = re.sub(r"/\*.*?\*/", "", text.replace("\\\n", "").replace("??/\n", ""), flags=re.DOTALL)
        assert "evil" not in code
    golden, _ = bundle.golden()
    honest = compiled(CExporter().source(bundle), tmp_path)
    assert np.array_equal(run(compiled(source, tmp_path), bundle, golden), run(honest, bundle, golden))
