"""edgekit export: the table, the JSON, and that nothing is written when it must not be."""

import json

from edgekit.bundle import GOLDEN, arrays_to_bytes, open_bundle, with_files, write_bundle


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


def test_help_ends_with_an_example(edgekit):
    done = edgekit("export", "--help")
    assert done.status == 0
    assert "edgekit export t2-gr --to onnx -o t2-onnx" in done.out
