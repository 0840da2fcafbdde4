"""edgekit inspect: the output for people and for programs, for every type of bundle."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from edgekit.bundle.encoding import Affine, Palette
from edgekit.bundle.format import assemble
from edgekit.bundle.pack import pack
from edgekit.bundle.store import write_bundle

QUALITY = {"value": 0.5, "low": 0.45, "high": 0.55, "samples": 1234}
STATE = {"quality": QUALITY, "bytes": 4000, "parameters": 600}
TIMES = {"before_ms": 0.4, "after_ms": 0.2, "ratio": 0.5, "low": 0.4, "high": 0.6}
LATENCY = [{"batch": 1, **TIMES}, {"batch": 8, **TIMES}]
RECORDS = (
    {
        "pass": "cluster",
        "parameters": {"bits": 4},
        "before": STATE,
        "plan": [],
        "loss": QUALITY,
        "latency": LATENCY,
        "after": {**STATE, "bytes": 2000, "quality": {**QUALITY, "value": 0.5125}},
        "kept": True,
        "reason": "2.00 times smaller",
        "seconds": 1.0,
    },
    {
        "pass": "quantize",
        "parameters": {},
        "before": STATE,
        "kept": False,
        "reason": "bits = 99; expected 2 to 8",
        "seconds": 0.1,
    },
    {
        "pass": "distill",
        "parameters": {},
        "before": STATE,
        "after": {**STATE, "quality": {**QUALITY, "value": None}},
        "loss": QUALITY,
        "latency": LATENCY,
        "kept": False,
        "reason": "the metric is nan",
        "seconds": 0.1,
    },
)
METRICS = {
    "log_loss": QUALITY,
    "log_loss_seeds": {"values": [0.5, 0.52, 0.54], "mean": 0.52, "half_width_95": 0.0497},
    "log_loss_by_days_since_first_detection": {"0": 2.5, "14": 1.5, "3": 2.0},
    "compression": {
        "metric": "x",
        "original": QUALITY,
        "change": {**QUALITY, "value": 0.0012},
        "latency": LATENCY,
        "limits": {},
        "runtime": "onnxruntime",
        "machine": {"cpu": "Some CPU", "cores": 2},
    },
    "cross_validation": {"folds": 5, "epochs": 60, "log_loss": {**QUALITY, "value": 0.61}},
}


@pytest.fixture
def rich_bundle(tiny_bundle):
    """The tiny bundle with two encoded weights, records and metrics."""
    weights = tiny_bundle.weights()
    embed, head = weights["embed.weight"], weights["classifier.weight"]
    codes = np.arange(embed.size, dtype=np.uint8).reshape(embed.shape) % 16
    encodings = {
        "embed.weight": Palette(4, codes, np.linspace(0, 1, 16, dtype=np.float32)),
        "classifier.weight": Affine(8, np.ones(head.shape, np.int8), np.full((len(head), 1), 0.5, np.float32)),
    }
    weights |= {name: encoding.decode() for name, encoding in encodings.items()}
    manifest = replace(
        tiny_bundle.manifest,
        records=RECORDS,
        metrics=METRICS,
        parent="ab" * 32,
        target="p40",
        data="toy",
        recipe={"pass": [{"name": "cluster", "bits": 4}]},
        versions={"edgekit": "9.9"},
        seed=7,
    )
    return assemble(manifest, weights, encodings, tiny_bundle.golden(), {"report.html": b"<html>"})


@pytest.fixture
def rich_file(rich_bundle, tmp_path):
    write_bundle(rich_bundle, tmp_path / "rich.edge")
    (tmp_path / "rich.edge" / "onnx").mkdir()
    return tmp_path / "rich.edge"


def test_people_see_what_it_is_and_how_it_was_made(edgekit, rich_file, rich_bundle, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = edgekit("inspect", rich_file)
    assert done.status == 0, done.err
    for words in (
        "light_curve (batch, 12, 2) float32, scaled flux",
        "rises, falls, peaks",
        "p40",
        "toy",
        "edgekit 9.9",
        "onnx",
        "report.html",
        rich_bundle.digest,
        "ab" * 32,
        "0.5000 [0.4500, 0.5500] (n = 1,234)",
        "0.5200 +- 0.0497, 3 seeds",
        "0: 2.500, 3: 2.000, 14: 1.500",
        "+0.0012 [+0.4500, +0.5500]",
        "0.50 times the time [0.40, 0.60]",
        "Some CPU, 2 cores",
        "0.6100",
        "bits = 4",
        "2.00/2.00",
        "rolled back",
        "bits = 99; expected 2 to 8",
    ):
        assert words in done.out, words
    assert max(map(len, done.out.splitlines())) <= 80


def test_programs_get_all_of_it(edgekit, rich_file, rich_bundle):
    found = json.loads(edgekit("inspect", rich_file, "--json").out)
    assert found["digest"] == rich_bundle.digest
    assert found["manifest"]["records"] == json.loads(json.dumps(RECORDS))
    assert found["manifest"]["metrics"] == METRICS
    assert found["exports"] == ["onnx"]
    assert found["other_files"] == ["report.html"]
    assert found["bytes"]["float32_weights"] == 4 * found["parameters"]
    assert found["bytes"]["packed"] == pytest.approx(len(pack(rich_bundle)), rel=0.01)
    assert "weights" not in found


def test_weights_by_tensor(edgekit, rich_file, rich_bundle):
    rows = {row["name"]: row for row in json.loads(edgekit("inspect", rich_file, "--weights", "--json").out)["weights"]}
    assert set(rows) == set(rich_bundle.weights())
    channels, bands = rich_bundle.weights()["embed.weight"].shape
    assert rows["embed.weight"] == {
        "name": "embed.weight",
        "shape": [channels, bands],
        "encoding": "palette 4 bit",
        "zeros": 1 / 16,
        "bytes": channels * bands // 2 + 4 * 16,
    }
    assert rows["classifier.weight"]["encoding"] == "affine 8 bit"
    assert rows["classifier.weight"]["bytes"] == 3 * channels + 4 * 3
    assert rows["embed.bias"]["encoding"] == "float32"
    assert rows["embed.bias"]["bytes"] == 4 * channels
    printed = edgekit("inspect", rich_file, "--weights").out
    assert "palette 4 bit" in printed
    assert f"{sum(row['bytes'] for row in rows.values()):,} bytes at code width" in printed


def test_packed_file_has_the_size_it_has(edgekit, rich_bundle, tmp_path):
    content = pack(rich_bundle)
    (tmp_path / "rich.edgepack").write_bytes(content)
    found = json.loads(edgekit("inspect", tmp_path / "rich.edgepack", "--json").out)
    assert found["bytes"]["packed"] == len(content)
    assert found["manifest"]["parent"] == rich_bundle.digest
    assert "passes" not in edgekit("inspect", tmp_path / "rich.edgepack").out  # history stays behind


def test_a_bare_bundle_has_no_empty_lines_to_fill(edgekit, tiny_file):
    out = edgekit("inspect", tiny_file).out
    assert not any(word in out for word in ("None", "metrics", "recipe", "passes", "exports", "parent"))


def test_markup_in_a_name_is_a_name(edgekit, tiny_bundle, tmp_path):
    write_bundle(replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name="[bold]x[/]")), tmp_path / "x.edge")
    assert edgekit("inspect", tmp_path / "x.edge").out.startswith("[bold]x[/]")


@pytest.mark.parametrize("options", [(), ("--json",), ("--weights",)])
def test_errors_are_one_line(edgekit, tiny_file, tmp_path, options):
    assert edgekit("inspect", tmp_path / "none.edge", *options).failed_with(1, "none.edge", "no such bundle")
    weights = tiny_file / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = edgekit("inspect", tiny_file, *options)
    assert done.failed_with(1, "weights.safetensors", "SHA-256")
    assert done.out == ""


def test_help_shows_examples(edgekit):
    out = edgekit("inspect", "--help").out
    assert "edgekit inspect t2-gr" in out
    assert "--weights" in out


@pytest.mark.parametrize("option", ["--weights", "--lineage"])
def test_needs_only_the_core(rich_file, option):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'matplotlib', 'onnx', 'onnxruntime'))); "
        "from edgekit.cli import main; sys.argv[:] = ['edgekit', 'inspect', *sys.argv[1:]]; main()"
    )
    command = [sys.executable, "-c", code, rich_file, option]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "rolled back" in done.stdout


def test_a_strangers_file_is_opened_in_a_process_of_its_own(edgekit, tiny_file, monkeypatch):
    from edgekit.cli import inspect as module

    plain = edgekit("inspect", tiny_file, "--json")
    monkeypatch.setattr(module, "_opened", lambda bundle: pytest.fail("this process has opened it"))
    found = edgekit("inspect", "--untrusted", tiny_file, "--json")
    assert (found.status, json.loads(found.out)) == (0, json.loads(plain.out))
    assert "opened in a process of its own, confined by: limits" in found.err
    assert "audit" in found.err
    assert "tiny" in edgekit("inspect", "--untrusted", tiny_file, "--weights").out


def test_an_error_of_a_strangers_file_is_one_line(edgekit, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"hello")
    assert edgekit("inspect", "--untrusted", tmp_path / "x.onnx").failed_with(1, "x.onnx", "not an ONNX model")
    assert edgekit("inspect", "--untrusted", tmp_path / "none.edge").failed_with(1, "no such bundle")


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"a": {"value": 1, "low": 0, "high": 2, "samples": "many"}}},
        {"metrics": {"a": {"values": 7, "mean": "x"}}},
        {"metrics": {"compression": [1]}},
        {"recipe": {"pass": 7}},
        {"recipe": {"pass": [7]}},
        {"records": [{"pass": "quantize"}]},
        {"records": [{"pass": [], "before": 3}]},
        {"preprocessing": {"id": [1]}, "metrics": {"a": {"b": {"c": None}}}},
    ],
)
@pytest.mark.parametrize("option", [[], ["--lineage"], ["--json"]])
def test_a_manifest_of_odd_content_is_shown_or_refused_in_one_line(changes, option, edgekit, tiny_file):
    manifest = json.loads((tiny_file / "edgekit.json").read_text())
    (tiny_file / "edgekit.json").write_text(json.dumps(manifest | changes))
    finished = edgekit("inspect", tiny_file, *option)
    assert finished.status == 0 or finished.failed_with(1, str(tiny_file))
