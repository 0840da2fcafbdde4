"""TensorRT kits: build.sh with the flags of each parser version, and a build on this machine with a stand-in for the
package."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekit.errors import EdgekitError
from edgekit.targets import profile as targets
from exporters import engines
from exporters.float32_pinned import Float32Pinned
from exporters.parser_versions import RTX, parser_versions
from exporters.target_graph import TargetGraph, deployment_target
from exporters.tensorrt_export import TensorRtExporter, build_script, engine_key, options, unpinned_notes

FAKE = Path(__file__).parent / "fake"
SHAPES = {"light_curve": {"min": [1, 12, 2], "opt": [16, 12, 2], "max": [64, 12, 2]}}
# one target for each parser version, and the stack if it is not the first
STACKS = {
    "8.2": ("jetson-nano", ""),
    "8.5": ("jetson-xavier-nx", ""),
    "8.6": ("tesla-p40", ""),
    "10": ("rtx-3060-12gb", "TensorRT 10"),
    "11": ("rtx-3060-12gb", "TensorRT 11"),
}


def all_deployments():
    for name in targets.names():
        for stack in targets.find(name).stacks:
            if stack.runtime == "tensorrt":
                yield deployment_target(name, "tensorrt", stack.name)


DEPLOYMENTS = list(all_deployments())


def flags(text: str) -> list[str]:
    """Return the options that a script gives trtexec."""
    command = text[text.index('"$TRTEXEC" \\\n') :]
    return re.findall(r"^\s+'?--(\w+)", command, re.MULTILINE)


@pytest.mark.parametrize(
    ("where", "precision"),
    [
        pytest.param(where, precision, id=f"{where.target.name}, {where.stack.name}, {precision}")
        for where in DEPLOYMENTS
        for precision in ("float32", "float16", "int8")
        if precision not in where.target.plan.never
    ],
)
def test_build_scripts_are_valid_and_use_only_the_options_of_their_version(where, precision, tmp_path):
    text = build_script(where, precision, SHAPES, 512, 3, "0" * 64)
    (tmp_path / "build.sh").write_text(text)
    for shell in ("bash", "sh"):
        done = subprocess.run([shell, "-n", tmp_path / "build.sh"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    used = flags(text)
    assert {"onnx", "saveEngine", "minShapes", "optShapes", "maxShapes"} <= set(used)
    assert set(used) <= where.parser_version.flags, set(used) - where.parser_version.flags
    assert len(used) == len(set(used))


def test_the_flag_table_has_teeth():
    """The test finds a flag of another version of TensorRT."""
    strong = options(deployment_target("rtx-3060-12gb", "tensorrt", "TensorRT 10"), "float16", SHAPES, 512, 3)
    used = {option[2:].partition("=")[0] for option in strong}
    assert "stronglyTyped" in used
    for name in ("8.2", "8.5", "8.6", "11"):
        assert not used <= parser_versions()[name].flags
    assert not {"fp16"} <= parser_versions()["11"].flags


@pytest.mark.parametrize(
    ("parser_version", "precision", "there", "absent"),
    [
        (
            "8.2",
            "float16",
            ["--fp16", "--workspace=512", "--buildOnly"],
            ["stronglyTyped", "memPoolSize", "builderOpt"],
        ),
        (
            "8.5",
            "int8",
            ["--int8", "--fp16", "--memPoolSize=workspace:512", "--buildOnly"],
            ["--workspace", "builderOpt"],
        ),
        (
            "8.6",
            "float32",
            ["--builderOptimizationLevel=3", "--skipInference"],
            ["fp16", "int8", "noTF32", "buildOnly"],
        ),
        ("8.6", "int8", ["--int8"], ["fp16", "Constraints"]),
        ("10", "float16", ["--stronglyTyped", "--skipInference"], ["fp16", "--workspace"]),
        ("10", "float32", ["--stronglyTyped", "--noTF32"], ["fp16"]),
        ("11", "float16", ["--skipInference"], ["stronglyTyped", "fp16"]),
        ("11", "int8", ["--skipInference"], ["int8", "fp16"]),
    ],
)
def test_each_parser_version_gets_its_own_options(parser_version, precision, there, absent):
    name, stack = STACKS[parser_version]
    where = deployment_target(name, "tensorrt", stack)
    assert where.parser_version.name == parser_version
    found = options(where, precision, SHAPES, 512, 3)
    assert set(there) <= set(found)
    assert not [option for option in found for word in absent if word in option]
    assert "--maxShapes=light_curve:64x12x2" in found


TRTEXEC = """#!/bin/sh
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] # trtexec $*"
case "$1" in --help) exit 0 ;; esac
for option in "$@"; do
    echo "$option" >> arguments.txt
    case "$option" in --saveEngine=*) echo plan > "${{option#--saveEngine=}}" ;; esac
done
"""


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    from tests.toys import toy_bundle

    folder = tmp_path_factory.mktemp("kit") / "nano"
    TensorRtExporter(target="jetson-nano").export(toy_bundle(context=2), folder)
    return folder


def build(kit, folder, version, **environment):
    """Run build.sh of a copy of the kit from another folder, with a trtexec that records its arguments."""
    copy = shutil.copytree(kit, folder / "kit")
    if version:
        (folder / "trtexec").write_text(TRTEXEC.format(version=version))
        (folder / "trtexec").chmod(0o755)
        environment["TRTEXEC"] = str(folder / "trtexec")
    done = subprocess.run(
        ["sh", copy / "build.sh"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={**os.environ, **environment},
    )
    return copy, done


def test_build_script_runs_and_gives_every_argument_whole(nano, tmp_path):
    copy, done = build(nano, tmp_path, "8201")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (copy / "model.plan").is_file()
    given = (copy / "arguments.txt").read_text().splitlines()
    assert "--onnx=model.onnx" in given
    assert "--minShapes=light_curve:1x12x2,context:1x2" in given
    assert given[-2:] == ["--fp16", "--buildOnly"]


def test_layers_that_must_stay_in_float32_are_named_to_trtexec_or_to_the_person(nano, toy, tmp_path):
    """build.sh names each layer to TensorRT 8.5. TensorRT 8.2 has no such option, so the kit says what may happen.
    Strong typing needs none."""
    kept = json.loads((nano / "manifest.json").read_text())
    assert "blocks.0.attention.Softmax" in kept["kept_in_float32"]
    (note,) = kept["notes"]
    assert f"{len(kept['kept_in_float32'])} layers" in note
    assert note in (nano / "README.md").read_text()
    assert "layerPrecisions" not in (nano / "build.sh").read_text()
    xavier = TensorRtExporter(target="jetson-xavier-nx").export(toy(context=2), tmp_path / "xavier").manifest
    assert xavier["notes"] == []
    copy, done = build(tmp_path / "xavier", tmp_path, "8502")
    assert done.returncode == 0, done.stdout + done.stderr
    given = dict(line.partition("=")[::2] for line in (copy / "arguments.txt").read_text().splitlines())
    assert given["--precisionConstraints"] == "prefer"
    pairs = [pair.rpartition(":") for pair in given["--layerPrecisions"].split(",")]
    assert sorted(name for name, _, _ in pairs) == sorted(xavier["kept_in_float32"])
    assert {precision for _, _, precision in pairs} == {"fp32"}
    orin = TensorRtExporter(target="jetson-orin-nano-8gb").export(toy(context=2), tmp_path / "orin").manifest
    assert (orin["notes"], orin["kept_in_float32"]) == ([], [])
    assert "Constraints" not in (tmp_path / "orin" / "build.sh").read_text()


def test_layers_whose_names_trtexec_cannot_read_are_named_to_the_person():
    kept = Float32Pinned(("a,b", "softmax"), ("a,b",))
    where = deployment_target("jetson-xavier-nx", "tensorrt")
    found = options(where, "float16", SHAPES, 512, 3, kept)
    assert "--layerPrecisions=softmax:fp32" in found
    assert not [option for option in found if "a,b" in option]
    (note,) = unpinned_notes(TargetGraph(onnx.ModelProto(), where, "float16", 1e-2, kept))
    assert "a,b" in note
    assert unpinned_notes(TargetGraph(onnx.ModelProto(), where, "float16", 1e-2, Float32Pinned(("softmax",)))) == []


def test_build_script_refuses_another_release(nano, tmp_path):
    copy, done = build(nano, tmp_path, "100300")
    assert done.returncode == 1
    assert "this is TensorRT 100300; this kit is for 8.2" in done.stderr
    assert not (copy / "model.plan").exists()


def test_build_script_without_trtexec_says_where_it_is(nano, tmp_path):
    _, done = build(nano, tmp_path, "", TRTEXEC="/nowhere/trtexec")
    assert done.returncode == 1
    assert "/usr/src/tensorrt/bin/trtexec" in done.stderr


def test_build_script_refuses_a_changed_graph(nano, tmp_path):
    damaged = shutil.copytree(nano, tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes(b"something else")
    (tmp_path / "run").mkdir()
    _, done = build(damaged, tmp_path / "run", "8201")
    assert done.returncode == 1
    assert "model.onnx is not the file that was exported" in done.stderr


def test_kits_hold_what_they_promise(nano):
    manifest = json.loads((nano / "manifest.json").read_text())
    assert sorted(path.name for path in nano.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert set(manifest["files"]) == {
        "model.onnx",
        "profile.json",
        "golden.npz",
        "verify.py",
        "build.sh",
        "requirements-jetson-nano.txt",
        "README.md",
    }
    readme = (nano / "README.md").read_text()
    for text in ("JetPack 4.6: TensorRT 8.2", "float16", "opset 13", "sh build.sh && python3 verify.py", "never int8"):
        assert text in readme
    assert (manifest["target"], manifest["sm"], manifest["parser_version"]) == ("jetson-nano", 53, "8.2")
    assert json.loads((nano / "profile.json").read_text())["context"]["max"] == [64, 2]
    assert (manifest["engine"]["file"], manifest["engine"]["built"]) == ("model.plan", False)
    assert manifest["engine"]["reason"] == "TensorRT is not installed here; build.sh builds it on the device"


def test_same_bundle_same_kit(nano, tmp_path, toy):
    TensorRtExporter(target="jetson-nano").export(toy(context=2), tmp_path / "again")
    for path in nano.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "name it: --target"),
        ({"target": "jetson-nano", "level": 6}, "level = 6; expected 0 to 5"),
        ({"target": "jetson-nano", "workspace": 0}, "workspace = 0 MiB"),
    ],
)
def test_wrong_parameters_are_named(given, message):
    with pytest.raises(EdgekitError, match=message):
        TensorRtExporter(**given)


# Building here, under tests/exporters/fake/tensorrt.py: the package itself is not on PyPI.


@pytest.fixture(scope="module")
def cudart(tmp_path_factory):
    """Return cudart(86), which builds a library that replaces CUDA's runtime on a GPU of this compute capability."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler to build the stand-in for CUDA's runtime with")
    folder = tmp_path_factory.mktemp("cudart")

    def compiled(capability: int) -> str:
        path = folder / f"libcudart-{capability}.so"
        if not path.exists():
            command = [compiler, "-shared", "-fPIC", f"-DCAPABILITY={capability}", "-o", path, FAKE / "cudart.c"]
            subprocess.run(command, check=True)
        return str(path)

    return compiled


@pytest.fixture
def fake(monkeypatch, cudart, tmp_path):
    """Return fake("8.2.1.8", 53), which installs TensorRT and a GPU for this process and those that it starts, and
    returns the module."""

    def installed(version: str, capability: int, **environment: str):
        for name, value in {"FAKE_TENSORRT": version, "EDGEKIT_CUDART": cudart(capability), **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("PYTHONPATH", str(FAKE))
        monkeypatch.syspath_prepend(str(FAKE))
        monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
        import tensorrt

        return tensorrt

    yield installed
    sys.modules.pop("tensorrt", None)


@pytest.mark.parametrize(
    ("parser_version", "version", "capability", "made"),
    [
        ("8.2", "8.2.1.8", 53, {"flags": ["FP16", "PREFER_PRECISION_CONSTRAINTS"], "network": 1, "level": None}),
        ("8.6", "8.6.1.6", 61, {"flags": [], "network": 1, "level": 2}),
        ("10", "10.13.3.9", 86, {"flags": [], "network": 2, "level": 2}),
        ("11", "11.4.0.106", 86, {"flags": [], "network": 2, "level": 2}),
    ],
)
def test_where_tensorrt_is_present_it_builds_caches_and_verifies(
    fake, toy, tmp_path, parser_version, version, capability, made
):
    trt = fake(version, capability)
    name, stack = STACKS[parser_version]
    exporter = TensorRtExporter(target=name, stack=stack, workspace=128, level=2)
    manifest = exporter.export(toy(context=2), tmp_path / "one").manifest
    engine = manifest["engine"]
    assert (engine["built"], engine["cached"], engine["sm"]) == (True, False, capability)
    assert engine["report"]["passed"]
    assert engine["report"]["runtime"] == "tensorrt"
    assert engine["report"]["device"]["compute_capability"] == capability
    assert (tmp_path / "one" / "model.plan").is_file()
    (found,) = trt.LOG
    assert {key: found[key] for key in made} == made
    assert found["workspace"] == 128 << 20
    assert found["float32"] == manifest["kept_in_float32"]
    assert bool(found["float32"]) == ("FP16" in found["flags"])
    assert set(found["float32 outputs"]) <= set(found["float32"])
    assert found["profiles"] == [
        {"light_curve": ((1, 12, 2), (16, 12, 2), (64, 12, 2)), "context": ((1, 2), (16, 2), (64, 2))}
    ]
    again = exporter.export(toy(context=2), tmp_path / "two").manifest
    assert again["engine"]["cached"]
    assert len(trt.LOG) == 1


@pytest.mark.parametrize(("parser_version", "version", "capability"), [("8.2", "8.2.1.8", 53), ("10", "10.13.3.9", 86)])
def test_a_kit_whose_least_batch_exceeds_the_stored_rows_is_checked_at_that_batch(
    fake, toy, tmp_path, parser_version, version, capability
):
    fake(version, capability)
    name, stack = STACKS[parser_version]
    exporter = TensorRtExporter(target=name, stack=stack, axes=("batch=16:32:64",))
    manifest = exporter.export(toy(context=2), tmp_path / "kit").manifest
    assert (manifest["least_batch"], manifest["largest_batch"]) == (16, 64)
    report = manifest["engine"]["report"]
    assert [check["batch"] for check in report["checks"]] == [16]
    assert report["passed"]


def test_a_shape_that_the_engine_does_not_take_is_named(fake, toy, tmp_path):
    """TensorRT only returns False for a shape outside the profile; a run would then use the shape before it."""
    fake("10.13.3.9", 86)
    name, stack = STACKS["10"]
    TensorRtExporter(target=name, stack=stack, axes=("batch=2:4:8",)).export(toy(context=2), tmp_path / "kit")
    manifest = json.loads((tmp_path / "kit" / "manifest.json").read_text())
    (tmp_path / "kit" / "manifest.json").write_text(json.dumps({**manifest, "least_batch": 1}))
    command = [sys.executable, tmp_path / "kit" / "verify.py", "--cudart", os.environ["EDGEKIT_CUDART"], "--runs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAIL: the engine does not take input light_curve in shape (1, 12, 2)" in done.stdout


def test_the_kit_itself_checks_its_engine_under_tensorrt(fake, toy, tmp_path):
    fake("8.2.1.8", 53)
    TensorRtExporter(target="jetson-nano").export(toy(context=2, output="logits"), tmp_path / "kit")
    command = [sys.executable, tmp_path / "kit" / "verify.py", "--cudart", os.environ["EDGEKIT_CUDART"], "--runs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "note: " not in done.stdout
    wrong = {**os.environ, "FAKE_TENSORRT_WRONG": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=wrong)
    assert done.returncode == 1
    assert "note: trtexec of TensorRT 8.2 has no option for single layers" in done.stdout
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "FAKE_TENSORRT": "8.6.1.6"}
    )
    assert done.returncode == 1
    assert "TensorRT 8.6.1.6 does not load this engine" in done.stdout


def test_a_gpu_of_another_kind_is_named_by_the_check(fake, cudart, toy, tmp_path):
    fake("8.2.1.8", 53)
    TensorRtExporter(target="jetson-nano").export(toy(), tmp_path / "kit")
    command = [sys.executable, tmp_path / "kit" / "verify.py", "--cudart", cudart(87)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this GPU has compute capability 8.7, the kit is for 5.3 (jetson-nano)" in done.stdout


def test_a_damaged_engine_in_the_cache_is_thrown_out(fake, toy, tmp_path):
    fake("8.2.1.8", 53)
    exporter = TensorRtExporter(target="jetson-nano")
    exporter.export(toy(), tmp_path / "one")
    (plan,) = (tmp_path / "cache" / "tensorrt").glob("*.plan")
    plan.write_bytes(plan.read_bytes()[4:])
    with pytest.raises(EdgekitError, match="does not load this engine"):
        exporter.export(toy(), tmp_path / "two")
    assert not exporter.export(toy(), tmp_path / "two").manifest["engine"]["cached"]


def test_an_engine_that_computes_nonsense_is_not_shipped(fake, toy, tmp_path):
    fake("10.13.3.9", 86, FAKE_TENSORRT_WRONG="1")
    bundle = toy(context=2, output="logits")
    with pytest.raises(EdgekitError, match=r"does not pass its check: .*WRONG"):
        TensorRtExporter(target="rtx-3060-12gb").export(bundle, tmp_path / "kit")
    assert not (tmp_path / "kit").exists()
    assert not list((tmp_path / "cache").rglob("*.plan"))


@pytest.mark.parametrize(
    ("version", "capability", "name"), [("8.2.1.8", 53, "jetson-nano"), ("10.13.3.9", 86, "rtx-3060-12gb")]
)
def test_parser_errors_are_shown_with_their_nodes(fake, toy, tmp_path, version, capability, name):
    """Versions before 10 give the node's number only."""
    fake(version, capability, FAKE_TENSORRT_LACKS="Softmax")
    message = (
        rf"TensorRT {version} refuses the graph: node 'blocks\.0\.attention\.Softmax' \(Softmax\): no importer found"
    )
    with pytest.raises(EdgekitError, match=message):
        TensorRtExporter(target=name).export(toy(), tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_what_the_builder_says_is_shown(fake, toy):
    from edgekit.graph.lower import lower

    trt = fake("10.13.3.9", 86)
    model = lower(toy())
    content = model.SerializeToString()
    trt.Config.add_optimization_profile = lambda self, profile: None
    with pytest.raises(EdgekitError, match=r"cannot build it: Network has dynamic .* no optimization profile"):
        engines.build(trt, model, content, SHAPES, lambda config: None, strong=True, what="TensorRT")


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("10.13.3.9", 53, "TensorRT 10.13.3.9 is here, the kit is for 8.2"),
        ("8.2.1.8", 86, "the GPU here is sm_86, the target is sm_53"),
    ],
)
def test_what_does_not_fit_the_target_is_not_built_and_said(fake, toy, tmp_path, version, capability, reason):
    fake(version, capability)
    manifest = TensorRtExporter(target="jetson-nano").export(toy(), tmp_path / "kit").manifest
    assert manifest["engine"] == {"file": "model.plan", "built": False, "reason": reason}


def test_the_cache_key_holds_all_that_an_engine_depends_on():
    base = (b"graph", SHAPES, "float16", 512, 3, "10.3.0", 87)
    others = [
        (b"other", *base[1:]),
        (base[0], {"light_curve": {**SHAPES["light_curve"], "max": [32, 12, 2]}}, *base[2:]),
        (*base[:2], "float32", *base[3:]),
        (*base[:3], 256, *base[4:]),
        (*base[:4], 4, *base[5:]),
        (*base[:5], "10.4.0", 87),
        (*base[:6], 86),
        (*base, Float32Pinned(("softmax",))),
    ]
    assert len({engine_key(*item) for item in (base, *others)}) == 9
    assert engine_key(*base) == engine_key(*base)


def test_the_stand_in_moves_real_memory(cudart):
    from exporters.engine_check import Cuda, Failed

    cuda = Cuda(cudart(86))
    array = np.arange(5, dtype=np.float32)
    pointer = cuda.allocate(array.nbytes)
    cuda.to_device(pointer, array)
    back = np.empty_like(array)
    cuda.to_host(back, pointer)
    assert np.array_equal(back, array)
    assert ctypes.c_float.from_address(pointer + 8).value == 2
    assert cuda.compute_capability() == 86
    with pytest.raises(Failed, match="some error"):
        cuda.check(1, "a test")
    with pytest.raises(Failed, match="no CUDA runtime found"):
        Cuda("/nowhere/libcudart.so")


def test_rtx_has_no_trtexec():
    assert parser_versions()[RTX].dialect == {}
