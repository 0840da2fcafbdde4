"""edgekit compress: the whole way on the toy problem, and every kind of bad input."""

import json
import math

import numpy as np
import pytest

from edgekit.bundle.format import MANIFEST, WEIGHTS, assemble
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.compression import report

RECIPE = """
[[pass]]
name = "magnitude_prune"
sparsity = 0.4
epochs = 1

[[pass]]
name = "cluster"
bits = 5
epochs = 1
"""


@pytest.fixture
def job(tiny_file, data_file, fake_runtime, tmp_path, monkeypatch):
    """Return the arguments of a run that works, without the report, which has tests of its own."""
    monkeypatch.setattr(report, "with_report", lambda bundle, source: bundle)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return {
        "model": tiny_file,
        "-o": tmp_path / "out.edge",
        "--recipe": tmp_path / "recipe.toml",
        "--data": data_file,
        "--runtime": "fake",
        "--max-loss": "0.1",
    }


def arguments(job, *flags, **changes):
    values = job | {name if name == "model" else f"--{name}".replace("_", "-"): v for name, v in changes.items()}
    model = values.pop("model")
    return ["compress", model, *(part for item in values.items() if item[1] is not None for part in item), *flags]


def test_compress_writes_a_bundle_and_a_table(job, edgekit, tmp_path):
    done = edgekit(*arguments(job))
    assert done.status == 0, done.err
    bundle = open_bundle(tmp_path / "out.edge")
    assert bundle.manifest.name == "out"
    assert [record["pass"] for record in bundle.manifest.records] == ["magnitude_prune", "cluster"]
    assert "cluster" in done.out
    assert "kept" in done.out
    assert "bytes packed" in done.out
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_json_goes_to_standard_output_and_progress_does_not(job, edgekit):
    done = edgekit(*arguments(job, "--json"))
    found = json.loads(done.out)
    assert found["packed_bytes"] < found["source_packed_bytes"]
    assert [record["kept"] for record in found["records"]] == [True, True]
    assert "pass 1 of 2" in done.err


def test_a_dry_run_prints_the_plan_and_changes_nothing(job, edgekit, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = edgekit(*arguments(job, "--dry-run"))
    assert done.status == 0
    assert "1. magnitude_prune: sparsity = 0.4" in done.out
    assert "Nothing was changed" in done.out
    job.pop("-o")
    as_json = json.loads(edgekit(*arguments(job, "--dry-run", "--json")).out)
    assert [step["pass"] for step in as_json] == ["magnitude_prune", "cluster"]
    assert as_json[1]["plan"][0]["after"] == "32 x 5 bit + 32 values"
    assert sorted(tmp_path.rglob("*")) == before


def test_max_size(job, edgekit, tmp_path):
    from edgekit.bundle.pack import pack

    edgekit(*arguments(job))
    limit = len(pack(open_bundle(tmp_path / "out.edge"))) - 200
    assert edgekit(*arguments(job, "--force", max_size=limit, max_loss=2)).status == 0
    assert len(pack(open_bundle(tmp_path / "out.edge"))) <= limit


def test_a_rolled_back_pass_shows_its_reason(job, edgekit, tmp_path):
    job["--recipe"].write_text('[[pass]]\nname = "quantize"\nbits = 2\nepochs = 0')
    done = edgekit(*arguments(job, max_loss=0))
    assert done.status == 0
    assert "rolled back" in done.out
    assert "costs +" in done.out.replace("\n", " ")


def test_a_metric_without_a_value_is_shown_as_a_dash(job, edgekit, monkeypatch):
    from edgekit.compression import metrics

    class Broken:
        name = "broken"
        labelled = True

        def value(self, probabilities, labels):
            return math.nan

    monkeypatch.setitem(metrics.METRICS, "broken", Broken())
    done = edgekit(*arguments(job, metric="broken"))
    assert done.status == 0, done.err
    assert "rolled back" in done.out


def test_an_existing_bundle_is_replaced_only_with_force(job, edgekit, tmp_path, tiny_bundle):
    write_bundle(tiny_bundle, tmp_path / "out.edge")
    assert edgekit(*arguments(job)).failed_with(1, "out.edge", "--force")
    assert open_bundle(tmp_path / "out.edge").manifest.name == "tiny"
    assert edgekit(*arguments(job, "--force")).status == 0
    assert open_bundle(tmp_path / "out.edge").manifest.name == "out"


def test_a_stopped_run_goes_on(job, edgekit, tmp_path, monkeypatch):
    from edgekit.cli import console

    def stop(message):
        if message.startswith("pass 2"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(console, "note", stop)
        assert edgekit(*arguments(job)).failed_with(130, "stopped")
    assert not (tmp_path / "out.edge").exists()
    done = edgekit(*arguments(job))
    assert done.status == 0
    assert "resuming after pass 1 of 2" in done.err
    assert "pass 1 of 2" not in done.err.replace("after pass 1 of 2", "")


def test_a_recipe_is_needed_when_the_model_has_none(job, edgekit):
    assert edgekit(*arguments(job, recipe=None)).failed_with(1, "tiny", "--recipe FILE")


def nan_weights(job, tiny_bundle):
    weights = tiny_bundle.weights()
    weights["embed.bias"][0] = np.nan
    write_bundle(assemble(tiny_bundle.manifest, weights, {}, tiny_bundle.golden()), job["model"], force=True)


def empty_folder(job, tiny_bundle):
    job["model"] = job["-o"].with_name("e.edge")
    job["model"].mkdir()


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def tamper(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


BAD = {
    "no model": (lambda job, _: job.update(model="nothing.edge"), 1, ["nothing.edge", "no such bundle"]),
    "unknown model": (lambda job, _: job.update(model="t2-xy"), 1, ["t2-xy"]),
    "empty folder": (empty_folder, 1, ["e.edge", "not a bundle"]),
    "wrong extension": (lambda job, _: job.update(model=job["--data"]), 1, ["toy.npz", "not a packed bundle"]),
    "no recipe file": (lambda job, _: job.update({"--recipe": "none.toml"}), 1, ["none.toml", "no such recipe"]),
    "recipe key": (lambda job, _: job["--recipe"].write_text('[[pass]]\nname = "cluster"\nbit = 3'), 1,
                   ["recipe.toml", "unknown parameter 'bit'", "did you mean 'bits'"]),
    "recipe pass": (lambda job, _: job["--recipe"].write_text('[[pass]]\nname = "clutser"'), 1,
                    ["unknown pass 'clutser'", "did you mean 'cluster'"]),
    "recipe is no TOML": (lambda job, _: job["--recipe"].write_text("[[pass"), 1, ["recipe.toml", "not valid TOML"]),
    "truncated manifest": (lambda job, _: cut(job["model"] / MANIFEST), 1, [MANIFEST, "not valid JSON"]),
    "truncated weights": (lambda job, _: cut(job["model"] / WEIGHTS), 1, [WEIGHTS, "SHA-256"]),
    "tampered weights": (lambda job, _: tamper(job["model"] / WEIGHTS), 1, [WEIGHTS, "SHA-256"]),
    "NaN weights": (nan_weights, 1, ["embed.bias", "NaN"]),
    "no data": (lambda job, _: job.update({"--data": "none.npz"}), 1, ["none.npz", "no such data file"]),
    "no data named": (lambda job, _: job.update({"--data": None}), 1, ["names no data set", "--data"]),
    "data is no npz": (lambda job, _: job["--data"].write_text("hello"), 1, ["toy.npz", "not an .npz archive"]),
    "no such metric": (lambda job, _: job.update({"--metric": "f1"}), 1, ["unknown metric 'f1'"]),
    "no such runtime": (lambda job, _: job.update({"--runtime": "tpu"}), 1, ["unknown runtime 'tpu'"]),
    "no output": (lambda job, _: job.pop("-o"), 2, ["-o/--output is missing"]),
    "negative loss": (lambda job, _: job.update({"--max-loss": "-1"}), 2, ["--max-loss"]),
    "loss that is no number": (lambda job, _: job.update({"--max-loss": "nan"}), 2, ["--max-loss"]),
    "loss without limit": (lambda job, _: job.update({"--max-loss": "inf"}), 2, ["--max-loss"]),
    "a replay of another recipe": (lambda job, _: job.update({"--replay": job["model"]}), 2, ["--replay", "--recipe"]),
    "a limit that nobody reads": (lambda job, _: job.update({"--max-latency": "1"}), 2, ["--max-latency", "--auto"]),
    "trials of nothing": (lambda job, _: job.update({"--trials": "3"}), 2, ["--trials", "--auto"]),
    "no size": (lambda job, _: job.update({"--max-size": "0"}), 2, ["--max-size"]),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "status", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_that_names_it(spoil, status, words, job, edgekit, tiny_bundle, tmp_path):
    spoil(job, tiny_bundle)
    done = edgekit(*arguments(job))
    done.err = "\n".join(line for line in done.err.splitlines() if not line.startswith("pass "))
    assert done.failed_with(status, *words)
    assert "Traceback" not in done.err
    assert not (tmp_path / "out.edge").exists()


def test_a_place_that_cannot_be_written_is_one_line(job, edgekit, tmp_path):
    (tmp_path / "file").touch()
    job["-o"] = tmp_path / "file" / "out.edge"
    assert edgekit(*arguments(job)).failed_with(1, "file")


def test_a_target_decides_and_its_estimate_is_labelled(job, edgekit, tmp_path):
    done = edgekit(*arguments(job, target="rtx-3060-12gb"))
    assert done.status == 0, done.err
    assert "rtx-3060-12gb is not this machine: latency is estimated from its data sheet" in done.err
    assert "(estimate)" in done.out
    bundle = open_bundle(tmp_path / "out.edge")
    assert bundle.manifest.target == "rtx-3060-12gb"
    assert {record["estimated_on"] for record in bundle.manifest.records} == {"rtx-3060-12gb"}


def test_a_pass_that_is_not_for_the_target_is_refused_before_the_work(job, edgekit, tmp_path):
    job["--recipe"].write_text(RECIPE + '\n[[pass]]\nname = "half"\n')
    done = edgekit(*arguments(job, target="tesla-p40"))
    assert done.status == 1
    assert (
        done.err.strip()
        .splitlines()[-1]
        .startswith("edgekit: pass 3 ('half'): tesla-p40 must not be given float16: Half precision runs at 1/64")
    )
    assert not (tmp_path / "out.edge").exists()
    assert "pass 1 of 3" not in done.err
    planned = edgekit(*arguments(job, "--dry-run", target="tesla-p40"))
    assert planned.status == 1
    assert "must not be given float16" in planned.err


def test_an_unknown_target_lists_what_is_there(job, edgekit):
    assert edgekit(*arguments(job, target="jetson")).failed_with(1, "unknown target 'jetson'", "jetson-nano", "h200")


def test_a_result_that_does_not_fit_is_not_written(job, edgekit, tmp_path, monkeypatch):
    from edgekit.targets import profile

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile.user_folder().mkdir(parents=True)
    text = profile.path_of("tesla-p40").read_text().replace("tesla-p40", "tiny").replace("24e9", "0.6e9")
    (profile.user_folder() / "tiny.toml").write_text(text)
    done = edgekit(*arguments(job, target="tiny"))
    assert done.status == 1
    assert "the result does not fit on tiny at batch size 256" in done.err
    assert "DOES NOT FIT in 600 MB" in done.err
    assert not (tmp_path / "out.edge").exists()


def test_the_report_says_that_latency_was_estimated(tiny_job, tmp_path):
    from edgekit.compression.run import run
    from edgekit.targets import profile

    steps = [("cluster", {"bits": 5, "epochs": 1})]
    elsewhere, here = (
        report.render(run(made := tiny_job(steps, target=target), tmp_path).bundle, made.source)
        for target in (profile.find("jetson-nano"), None)
    )
    assert "Latency is an estimate for jetson-nano, from its data sheet: nothing was run there." in elsewhere
    assert "ms on jetson-nano (estimate), batch 1" in elsewhere
    assert "CPU ms, batch" not in elsewhere
    assert "estimate" not in here
    assert "CPU ms, batch 1" in here


def test_a_language_model_is_compressed_by_another_command(edgekit, tmp_path):
    found = edgekit("compress", "model.gguf", "-o", str(tmp_path / "small.edge"))
    assert found.status == 1
    assert "run: edgekit llm compress model.gguf" in found.err
