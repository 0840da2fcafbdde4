"""The check that travels with an export: what it calls wrong, where operators ran, and models that were changed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from edgekit.graph.lower import lower
from exporters.device_check import CPU, differences, load_onnxruntime, ran_elsewhere, sha256
from exporters.onnx_export import FLOAT, OnnxExporter


def run_check(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-I", str(folder / "verify.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_device_check_fails_on_a_changed_model(toy, tmp_path):
    out = tmp_path / "out"
    OnnxExporter().export(toy(), out)
    model = onnx.load(out / FLOAT)
    weight = model.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(model, out / FLOAT)
    done = run_check(out)
    assert done.returncode == 1
    assert "not the file that was exported" in done.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["files"][FLOAT]  # even when the hash is not there to tell
    (out / "manifest.json").write_text(json.dumps(manifest))
    done = run_check(out)
    assert done.returncode == 1
    assert "WRONG" in done.stdout


def test_a_missing_runtime_is_one_line(toy, tmp_path):
    OnnxExporter().export(toy(), tmp_path / "out")
    script = tmp_path / "out" / "verify.py"
    code = "import runpy, sys; sys.modules['onnxruntime'] = None; "
    code += f"sys.argv = [{str(script)!r}]; runpy.run_path({str(script)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith("onnxruntime is not installed; run: ")
    assert done.stdout.endswith("-m pip install onnxruntime\n")
    assert not done.stderr


def test_device_check_refuses_an_absent_provider(toy, tmp_path):
    OnnxExporter().export(toy(), tmp_path / "out")
    done = run_check(tmp_path / "out", "--provider", "NoSuchExecutionProvider")
    assert done.returncode == 1
    assert "choose from" in done.stdout


def test_what_ran_elsewhere_is_read_out_of_the_runtimes_profile(toy, tmp_path):
    """A real profile of a graph on the CPU: asked for the CPU nothing is amiss, asked for a GPU everything is."""
    bundle = toy(context=2)
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    content = lower(bundle).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    session.run(None, bundle.golden()[0])
    events = json.loads(Path(session.end_profiling()).read_text())
    assert ran_elsewhere(events, "CPUExecutionProvider") == []
    found = ran_elsewhere(events, "CUDAExecutionProvider")
    assert {"MatMul", "Softmax", "every operator"} <= set(found)
    for event in events:
        if event.get("args", {}).get("op_name") != "Softmax" and "provider" in event.get("args", {}):
            event["args"]["provider"] = "CUDAExecutionProvider"
    assert ran_elsewhere(events, "CUDAExecutionProvider") == ["Softmax"]


def test_a_provider_that_says_it_runs_and_does_not_is_found_out(toy, tmp_path, monkeypatch):
    """onnxruntime lists CUDA, starts it, and leaves every node to the CPU."""

    class Pretender(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers):
            assert providers == [("CUDAExecutionProvider", {"use_tf32": "0"})]
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self):
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    bundle = toy()
    OnnxExporter().export(bundle, tmp_path / "out")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Pretender)
    with pytest.raises(LookupError, match=r"CUDAExecutionProvider does not run all of model.onnx: .*MatMul.*elsewhere"):
        load_onnxruntime(tmp_path / "out" / FLOAT, "CUDAExecutionProvider", bundle.golden()[0], {})


# --- what is wrong

X = np.arange(10, dtype=np.float32).reshape(5, 2)


def counted(wanted, run, tolerance=0.1):
    """The number of outputs that are beyond the tolerance, at batch 1 and with all rows."""
    return differences("here", run, {"x": X}, wanted, tolerance)


def by(factor, offset=0.0):
    return lambda names, feeds: [feeds["x"] * np.float32(factor) + np.float32(offset) for _ in names]


def test_outputs_are_compared_alone_and_together(capsys):
    assert counted({"y": X}, by(1)) == 0
    assert counted({"y": X}, lambda names, feeds: [feeds["x"] * (1 + 10 * (len(feeds["x"]) == 1))]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert ["WRONG" in line for line in lines] == [False, False, True, False]
    assert "here, batch 1: y off by" in lines[2]


def test_rows_that_are_exchanged_are_wrong():
    assert counted({"y": X}, lambda names, feeds: [feeds["x"][::-1]]) == 1


def test_the_difference_is_a_share_of_the_largest_value_but_not_of_probabilities():
    assert counted({"y": 100 * X}, by(100, 80)) == 0
    assert counted({"y": X / 100}, by(0.01, 0.2)) == 2, "nothing below 1 counts as a scale"
    assert counted({"probabilities": 100 * X}, by(100, 80)) == 2


def test_what_is_no_number_is_wrong():
    assert counted({"y": X}, by(np.nan)) == 2


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64])
def test_codes_and_classes_are_compared_by_the_share_that_differs(dtype, capsys):
    """A difference of booleans is an error in numpy, and one of uint8 wraps around."""
    wanted = np.array([0, 1, 1, 0, 1]).astype(dtype)
    assert counted({"y": wanted}, lambda names, feeds: [(feeds["x"][:, 0] % 4 == 2).astype(dtype)]) == 2
    assert "y off by 6.0e-01" in capsys.readouterr().out
    rows = {tuple(row): value for row, value in zip(X.tolist(), wanted, strict=True)}
    same = lambda names, feeds: [np.array([rows[tuple(row)] for row in feeds["x"].tolist()], dtype)]  # noqa: E731
    assert counted({"y": wanted}, same) == 0


def test_every_output_is_counted():
    assert counted({"y": X, "z": X}, by(9)) == 4


@pytest.mark.parametrize(
    ("name", "made", "elsewhere"),
    [
        ("Shape", [{"int64": [3]}], False),
        ("Gather", [{"float": []}], False),
        ("Gather", [{"float": [1, 1]}], False),
        ("Gather", [{"float": [2]}], True),
        ("Cast", [{"int64": [1]}, {"float16": [1, 2]}], True),
        ("FusedMatMul", [], True),
    ],
)
def test_arithmetic_on_shapes_may_run_elsewhere_and_numbers_may_not(name, made, elsewhere):
    events = [
        {"args": {"op_name": "Exp", "provider": "GPU"}},
        {"name": "session_initialization"},
        {"args": {"op_name": name, "provider": CPU, "output_type_shape": made}},
    ]
    assert ran_elsewhere(events, "GPU") == ([name] if elsewhere else [])


def test_a_profile_without_the_provider_is_every_operator_elsewhere():
    assert ran_elsewhere([], "GPU") == ["every operator"]


def test_a_file_that_is_not_there_has_no_hash(tmp_path):
    assert sha256(tmp_path / "none") is None
    assert sha256(tmp_path) is None
