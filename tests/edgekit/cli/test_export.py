"""edgekit export: the table, the JSON, and the cases in which nothing may be written."""

import json

import pytest

from edgekit.bundle.format import GOLDEN, with_files
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import arrays_to_bytes


def test_writes_and_shows_the_verification(edgekit, tiny_file, tmp_path):
    done = edgekit("export", tiny_file, "--to", "onnx", "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert "max |dp|" in done.out
    assert "classes changed" in done.out
    assert [line.split()[2] for line in done.out.splitlines() if line.startswith("model.onnx")] == ["1", "16", "1000"]
    assert (tmp_path / "out" / "verify.py").is_file()


def test_json_and_opset(edgekit, tiny_file, tmp_path):
    done = edgekit("export", tiny_file, "--to", "onnx", "-o", tmp_path / "out", "--opset", "16", "--json")
    report = json.loads(done.out)
    assert report["manifest"]["opset"] == 16
    assert report["manifest"]["bundle"] == open_bundle(tiny_file).digest
    assert all(check["changed"] == 0 for check in report["manifest"]["checks"])


def test_beyond_tolerance_nothing_is_written(edgekit, tiny_file, tmp_path):
    bundle = open_bundle(tiny_file)
    inputs, expected = bundle.golden()
    wrong = arrays_to_bytes(
        {f"in.{name}": array for name, array in inputs.items()}
        | {f"out.{name}": array[::-1] for name, array in expected.items()}
    )
    write_bundle(with_files(bundle, {GOLDEN: wrong}), tmp_path / "wrong.edge")
    before = sorted(tmp_path.iterdir())
    done = edgekit("export", tmp_path / "wrong.edge", "--to", "onnx", "-o", tmp_path / "out", "--json")
    assert done.failed_with(1, "model.onnx at batch 1", "golden outputs", "allowed", "Nothing was written")
    assert sorted(tmp_path.iterdir()) == before


def test_errors_name_what_is_allowed(edgekit, tiny_file, tmp_path):
    target = tmp_path / "out"
    export = ("export", tiny_file, "-o", target, "--json")
    assert edgekit(*export, "--to", "onnxx").failed_with(1, "unknown export format 'onnxx'", "did you mean 'onnx'")
    assert edgekit(*export, "--to", "onnx", "--opset", "12").failed_with(1, "opset 12", "13 to 20")
    assert edgekit(*export).failed_with(2, "--to")
    target.mkdir()
    (target / "mine").touch()
    assert edgekit(*export, "--to", "onnx").failed_with(1, "already exists", "--force")
    assert edgekit(*export, "--to", "onnx", "--force").failed_with(1, "is not an export")


def test_a_kit_for_a_device(edgekit, tiny_file, tmp_path):
    kit = ("export", tiny_file, "--to", "tensorrt", "--target", "jetson-nano", "--axis", "batch=1:2:4")
    done = edgekit(*kit, "-o", tmp_path / "kit")
    assert done.status == 0, done.err
    assert "jetson-nano: JetPack 4.6: TensorRT 8.2, float16" in done.out
    assert "model.plan: not built; TensorRT is not installed here" in done.out
    assert f"sh {tmp_path / 'kit' / 'build.sh'} && python3 " in " ".join(done.out.split())
    assert "--maxShapes=light_curve:4x12x2" in (tmp_path / "kit" / "build.sh").read_text()


def test_onnx_for_a_target_in_json(edgekit, tiny_file, tmp_path):
    done = edgekit("export", tiny_file, "--to", "onnx", "--target", "tesla-p40", "-o", tmp_path / "out", "--json")
    manifest = json.loads(done.out)["manifest"]
    assert (manifest["target"], manifest["precision"], manifest["opset"]) == ("tesla-p40", "float32", 17)


def test_impossible_targets_list_those_that_are_possible(edgekit, tiny_file, tmp_path):
    export = ("export", tiny_file, "-o", tmp_path / "out", "--json")
    kit = (*export, "--to", "tensorrt")
    assert edgekit(*kit).failed_with(1, "name it: --target")
    assert edgekit(*kit, "--target", "tesla-p41").failed_with(1, "unknown target", "did you mean 'tesla-p40'")
    assert edgekit(*kit, "--target", "x86-avx2").failed_with(1, "has no tensorrt", "onnxruntime", "jetson-nano")
    assert edgekit(*kit, "--target", "tesla-p40", "--precision", "float16").failed_with(1, "must not be given float16")
    assert edgekit(*kit, "--target", "jetson-nano", "--opset", "17").failed_with(1, "newer", "takes up to 13")
    assert edgekit(*kit, "--target", "tesla-p40", "--axis", "bath=1:2:3").failed_with(1, "unknown axis", "'batch'")
    assert edgekit(*export, "--to", "c", "--target", "tesla-p40").failed_with(2, "--target means nothing")
    assert edgekit(*export, "--to", "c", "--axis", "batch=1:2:3").failed_with(2, "--axis means nothing")
    assert not (tmp_path / "out").exists()


def test_an_engine_for_a_card_that_it_cannot_be_for(edgekit, tiny_file, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'edgekit[rtx]'")
    done = edgekit(
        "export", tiny_file, "--to", "tensorrt-rtx", "--target", "tesla-p40", "-o", tmp_path / "out", "--json"
    )
    assert done.failed_with(1, "compute capability 6.1", "8.6", "rtx-3060-12gb")


def test_help_ends_with_an_example(edgekit):
    done = edgekit("export", "--help")
    assert done.status == 0
    assert "edgekit export t2-gr --to onnx -o t2-onnx" in done.out
