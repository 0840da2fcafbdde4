"""edgekit doctor: what it prints, its exit status, and that it starts quickly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper

SYSTEMS = Path(__file__).parents[1] / "doctor/systems"
P40, CUDNN = SYSTEMS / "p40-good.json", SYSTEMS / "p40-cudnn-9.28.json"


def test_this_machine(edgekit):
    done = edgekit("doctor", "--json")
    report = json.loads(done.out)
    statuses = [check["status"] for check in report["checks"]]
    assert done.status == int("error" in statuses)
    assert {"name", "status", "finding", "remedy"} == set(report["checks"][0])
    assert report["guessed"] is True
    assert {"machine", "memory", "CPU"} <= {check["name"] for check in report["checks"]}
    assert report["system"]["packages"]["numpy"]


def test_a_report_can_be_judged_elsewhere(edgekit, tmp_path):
    report = edgekit("doctor", "--json").out
    (tmp_path / "there.json").write_text(report)
    again = edgekit("doctor", "--system", tmp_path / "there.json", "--json").out
    assert json.loads(again) == json.loads(report)


def test_a_line_for_each_check_and_its_remedy_below(edgekit):
    done = edgekit("doctor", "--system", CUDNN, "--target", "tesla-p40")
    lines = done.out.splitlines()
    assert done.status == 1
    assert done.err == ""
    at = next(number for number, line in enumerate(lines) if "none in libcudnn_adv.so.9" in line)
    assert lines[at].startswith("error   sm_61 code  nvidia-cudnn-cu12 9.28.0.42")
    assert lines[at + 1].strip() == "fix: pip install nvidia-cudnn-cu12==9.10.2.21"
    assert sum("onnxruntime-gpu==1.26.0" in line for line in lines) == 1  # a long remedy is printed once
    assert "fix: the same as above" in done.out


def test_the_good_twin_passes(edgekit):
    done = edgekit("doctor", "--system", P40, "--target", "tesla-p40")
    assert done.status == 0
    assert all(line.startswith("ok ") for line in done.out.splitlines())


def test_a_bundle_on_a_target_needs_no_such_machine(edgekit, tiny_file):
    done = edgekit("doctor", tiny_file, "--target", "jetson-nano", "--json")
    report = json.loads(done.out)
    assert done.status == 0, done.out
    assert "system" not in report
    assert [check["name"] for check in report["checks"]] == ["model", "precision", "model memory", "operators"]
    finding = "TensorRT 8.2 takes it, exported in opset 13 and float16: by the table of its operators"
    assert report["checks"][-1]["finding"] == finding
    assert report["needs"]["activations"] > 0
    assert report["needs"]["opset"] is None
    assert edgekit("doctor", tiny_file, "--target", "jetson-nano", "--batch", 10_000_000).status == 1


def test_a_bundle_on_a_recorded_machine(edgekit, tiny_file):
    done = edgekit("doctor", tiny_file, "--system", P40, "--target", "tesla-p40")
    assert done.status == 0
    assert "free on the GPU" in done.out
    assert "onnxruntime (CUDAExecutionProvider)" in done.out


@pytest.mark.parametrize(("operator", "taken"), [("Relu", True), ("Det", False)])
def test_what_a_targets_parser_makes_of_a_graph(edgekit, tmp_path, operator, taken):
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 3])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 3] if taken else ["batch"])
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], name="it")], "g", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    checks = json.loads(edgekit("doctor", tmp_path / "m.onnx", "--target", "jetson-nano", "--json").out)["checks"]
    (found,) = [check for check in checks if check["name"] == "operators"]
    assert found["status"] == ("ok" if taken else "warning")
    assert taken or "TensorRT 8.2 does not take node 'it' (Det)" in found["finding"]
    assert taken or found["remedy"] == "use onnxruntime 1.11 for JetPack 4.6"


def test_a_precision_that_must_not_be_is_said_once(edgekit, tmp_path):
    """doctor asks no parser about it and advises no other runtime."""
    import numpy as np
    import onnx

    from tests.exporters.test_parser_versions import quantized

    onnx.save(quantized(np.int8(0)), tmp_path / "m.onnx")
    done = edgekit("doctor", tmp_path / "m.onnx", "--target", "jetson-nano")
    assert done.status == 1
    assert done.out.count("no unit for int8") == 1


def test_what_a_targets_parser_makes_of_a_network(edgekit, tiny_file, monkeypatch):
    """doctor exports the network for each stack. An operator table without Softmax refuses it and names the node."""
    from dataclasses import replace

    from exporters import parser_versions

    every = json.loads(edgekit("doctor", tiny_file, "--target", "rtx-3060-12gb", "--json").out)["checks"]
    said = [check["finding"] for check in every if check["name"] == "operators"]
    assert [text.partition(" takes it")[0] for text in said] == ["TensorRT-RTX", "TensorRT 10", "TensorRT 11"]
    table = parser_versions.parser_versions()
    poor = {
        name: replace(item, operators=item.operators - ({"Softmax"} if name in ("8.2", "10", "rtx") else set()))
        for name, item in table.items()
    }
    monkeypatch.setattr(parser_versions, "parser_versions", lambda: poor)
    done = edgekit("doctor", tiny_file, "--target", "rtx-3060-12gb", "--json")
    refused = [check for check in json.loads(done.out)["checks"] if "does not take node" in check["finding"]]
    assert {check["status"] for check in refused} == {"warning"}  # TensorRT 11 and onnxruntime are left
    assert len(refused) == 2
    assert "(Softmax)" in refused[0]["finding"]
    assert done.status == 0
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    (unseen,) = [
        check
        for check in json.loads(edgekit("doctor", tiny_file, "--target", "tesla-p40", "--json").out)["checks"]
        if check["name"] == "operators"
    ]
    assert unseen["finding"] == "TensorRT's parsers were not run: the network cannot be exported without torch"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "tesla-p4"], ["unknown target 'tesla-p4'", "did you mean 'tesla-p40'"]),
        (["--system", "none.json"], ["none.json", "no such file", "edgekit doctor --json"]),
        (["no-such-model"], ["unknown model 'no-such-model'"]),
    ],
)
def test_mistakes_are_one_line(edgekit, arguments, words):
    assert edgekit("doctor", *arguments).failed_with(1, *words)


def test_a_name_that_moves_the_cursor_is_escaped(capsys):
    from edgekit.cli.doctor import show
    from edgekit.doctor.finding import Finding

    show([Finding("model", "ok", "a\x1b[2Jb\u202e: onnx", "use c\x1b[2Jd")])
    printed = capsys.readouterr().out
    assert r"a\x1b[2Jb\u202e: onnx" in printed
    assert r"use c\x1b[2Jd" in printed
    assert "\x1b" not in printed


def test_it_starts_without_torch_and_onnx():
    code = (
        "import sys; sys.argv = ['edgekit', 'doctor']\n"
        "from edgekit.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
