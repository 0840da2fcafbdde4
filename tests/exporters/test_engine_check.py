"""The check that travels: Python 3.6 grammar, onnxruntime as its stand-in, and every way to fail."""

import ast
import builtins
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import exporters
from exporters.base import hashes
from exporters.tensorrt_export import TensorRtExporter

SOURCE = Path(exporters.__file__).parent / "engine_check.py"
SCRIPTS = [SOURCE, SOURCE.with_name("device_check.py")]  # a Jetson Nano has Python 3.6
NEWER = {"capture_output", "text", "missing_ok"}  # arguments that Python 3.6 does not know


def grammar(source: str) -> None:
    """Raise SyntaxError for syntax or calls that Python 3.6 does not have."""
    tree = ast.parse(source, feature_version=(3, 6))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise SyntaxError("annotations from the future came with 3.7")
        if isinstance(node, ast.keyword) and node.arg in NEWER:
            raise SyntaxError(f"{node.arg}= came later")
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            for part in ast.walk(annotation) if annotation else ():
                union = isinstance(part, ast.BinOp) and isinstance(part.op, ast.BitOr)
                generic = isinstance(part, ast.Subscript) and getattr(part.value, "id", "") in vars(builtins)
                if union or generic:
                    raise SyntaxError("evaluated when the function is defined, which Python 3.6 cannot: quote it")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_what_travels_is_written_in_python_3_6(script):
    grammar(script.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "if (n := 1): pass", "from __future__ import annotations", "def f(a, /): pass",
        "import subprocess; subprocess.run([], capture_output=True)", "def f(a: str | None): pass",
        "def f() -> list[int]: pass",
    ],
)  # fmt: skip
def test_the_grammar_check_has_teeth(line):
    with pytest.raises(SyntaxError):
        grammar(SOURCE.read_text() + "\n" + line)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    from tests.toys import toy_bundle

    folder = tmp_path_factory.mktemp("kit") / "nano"
    TensorRtExporter(target="jetson-nano").export(toy_bundle(context=2), folder)
    return folder


@pytest.fixture
def copy(kit, tmp_path):
    import shutil

    return Path(shutil.copytree(kit, tmp_path / "kit"))


def check(folder, *arguments):
    command = [sys.executable, "-I", str(folder / "verify.py"), "--runs", "3", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rewrite(folder, **changes):
    """Change the manifest, with right hashes of the files."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = hashes({name: (folder / name).read_bytes() for name in manifest["files"]})
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_onnxruntime_stands_in_and_a_report_is_written(copy):
    done = check(copy, "--runtime", "onnxruntime")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("PASS")
    report = json.loads((copy / "report.json").read_text())
    assert report["passed"]
    assert report["kit"]["target"] == "jetson-nano"
    assert report["runtime"] == "onnxruntime"
    assert [item["batch"] for item in report["latency"]] == [1, 6]
    assert all(item["p50"] > 0 for item in report["latency"])
    assert all(item["difference"] < 2e-3 and item["same_largest"] == 1 for item in report["checks"])
    assert {"machine", "python", "numpy"} <= set(report["device"])


def test_wrong_golden_outputs_fail(copy):
    with np.load(copy / "golden.npz") as golden:
        arrays = {name: golden[name] for name in golden.files}
    np.savez(copy / "golden.npz", **{**arrays, "out.probabilities": arrays["out.probabilities"] + 0.1})
    rewrite(copy)
    done = check(copy, "--runtime", "onnxruntime")
    assert done.returncode == 1
    assert "WRONG" in done.stdout
    assert "note: " not in done.stdout  # that trtexec may do this or that says nothing of onnxruntime
    assert not json.loads((copy / "report.json").read_text())["passed"]


def test_a_changed_file_is_named(copy):
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes() + b"\0")
    done = check(copy, "--runtime", "onnxruntime")
    assert done.returncode == 1
    assert "model.onnx: missing, or not the file that was exported" in done.stdout


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
def test_without_tensorrt_it_says_so_and_falls_back_to_nothing(copy):
    done = check(copy)
    assert done.returncode == 1
    assert "FAIL: tensorrt is not installed" in done.stdout
    assert "--runtime onnxruntime" in done.stdout
    assert not (copy / "report.json").exists()


def test_rows_stay_within_the_engine(copy):
    rewrite(copy, largest_batch=2)
    assert check(copy, "--runtime", "onnxruntime").returncode == 0
    report = json.loads((copy / "report.json").read_text())
    assert [item["batch"] for item in report["latency"]] == [1, 2]
