"""Providers: the runtime's own profile says where nodes ran, so that a fall-back to the CPU does not count as the
GPU."""

import json
import subprocess

import numpy as np
import pytest

from edgekit.doctor import providers
from edgekit.doctor.providers import CPU, NETWORK, complaint, main, observe
from edgekit.doctor.system import Provider

onnxruntime = pytest.importorskip("onnxruntime")


def test_the_network_is_what_its_comment_says():
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    kernel = np.zeros((1, 1, 3, 3), np.float32)
    kernel[0, 0, 1, 1] = 1
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], pads=[1] * 4), helper.make_node("MatMul", ["c", "c"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in "xy")
    graph = helper.make_graph(nodes, "probe", [x], [y], [numpy_helper.from_array(kernel, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    model.producer_name = ""
    onnx.checker.check_model(model)
    assert onnx.load_from_string(NETWORK) == model


def test_the_cpu_really_runs():
    found, problem = observe(gpu=True)
    assert problem == ""
    assert found[-1] == Provider(CPU, (CPU,))
    assert not {item.name for item in found} & set(providers.REMOTE)


def test_a_provider_that_is_not_there_is_seen_to_fall_back():
    """onnxruntime only warns, and runs on the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has it")
    with pytest.warns(UserWarning, match="not in available"):
        answer = main("CUDAExecutionProvider")
    assert answer["ran"] == [CPU]
    assert not Provider("CUDAExecutionProvider", tuple(answer["ran"])).active


def test_wrong_numbers_are_a_problem(monkeypatch):
    monkeypatch.setattr(np, "allclose", lambda *a, **k: False)
    assert main(CPU)["problem"] == "gives wrong numbers"


def finished(out="", err="", status=0):
    return lambda *a, **k: subprocess.CompletedProcess(a, status, out, err)


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        (
            finished(err="Traceback\nModuleNotFoundError: No module named 'onnxruntime'"),
            "ModuleNotFoundError: No module named 'onnxruntime'",
        ),
        (finished(status=-11), "the process ended with status -11"),
        (finished(out="no JSON", err=""), "the process ended with status 0"),
    ],
)
def test_a_process_that_dies(process, expected, monkeypatch):
    monkeypatch.setattr(subprocess, "run", process)
    assert observe(gpu=True) == ((), expected)


def test_one_that_hangs(monkeypatch):
    def hang(*arguments, **options):
        raise subprocess.TimeoutExpired("x", 1)

    monkeypatch.setattr(subprocess, "run", hang)
    assert observe(gpu=True) == ((), f"gave no answer within {providers.SECONDS} s")


def test_the_reason_is_taken_from_the_log(monkeypatch):
    log = (
        "\x1b[0;93m2026-11-26 [W:onnxruntime] something\x1b[m\n\x1b[1;31m2026 [E:onnxruntime:Default, provider_bridge] "
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.12: cannot open shared "
        "object file: No such file or directory\x1b[m\nlast line\n"
    )
    assert complaint(log) == "libcublasLt.so.12: cannot open shared object file"
    assert complaint("a\nb\n") == "b"
    assert complaint(f"{log}{providers.AGAIN}\nCUDA failure 35\n") == "CUDA failure 35"  # the first attempt is settled
    assert complaint("") == ""
    cuda = "CUDAExecutionProvider"
    answers = {CPU: {"available": [cuda, CPU], "ran": [CPU]}, cuda: {"available": [cuda, CPU], "ran": [CPU]}}
    monkeypatch.setattr(
        subprocess, "run", lambda command, **k: finished("noise\n" + json.dumps(answers[command[-1]]), log)()
    )
    assert observe(gpu=True)[0] == (
        Provider(cuda, (CPU,), problem="libcublasLt.so.12: cannot open shared object file"),
        Provider(CPU, (CPU,)),
    )


def test_without_a_gpu_its_providers_are_not_tried(monkeypatch):
    answer = {"available": ["CUDAExecutionProvider", CPU], "ran": [CPU]}
    asked = []
    monkeypatch.setattr(providers, "_ask", lambda name: asked.append(name) or answer)
    found, _ = observe(gpu=False)
    assert asked == [CPU]
    assert found[0] == Provider("CUDAExecutionProvider", problem="there is no NVIDIA GPU, so it was not tried")
    observe(gpu=True)
    assert asked == [CPU, CPU, "CUDAExecutionProvider"]
