"""edgekit search"""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.edgekit.nas import toy_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    path = toy_study.write(folder)
    text = path.read_text().replace("candidates = 6\ngeneration = 3", "candidates = 2\ngeneration = 2\ncontrol = false")
    path.write_text(text.replace("keep = [2]\nseeds = 2", "keep = [1]\nseeds = 2"))
    return folder


def test_a_study_is_run_shown_explained_and_resumed(folder, edgekit):
    study = folder / "study"
    done = edgekit("search", "run", folder / "spec.toml", "-o", study)
    assert done.status == 0
    assert "accuracy on the test rows" in done.out
    assert "told apart" in done.out
    (bundle,) = (study / "networks").iterdir()
    shown = json.loads(edgekit("search", "report", study, "--json").out)
    assert shown["trials"] == {"generator": 2}
    key = shown["finalists"][0]["key"]
    assert bundle.stem == key
    told = edgekit("search", "explain", study, key[:6])
    assert told.status == 0
    assert "stem " in told.out
    assert "Conv" in told.out
    parts = json.loads(edgekit("search", "explain", study, key, "--json").out)
    assert sum(row["parameters"] for row in parts["parts"]) == shown["finalists"][0]["parameters"]
    assert sum(row["macs"] for row in parts["parts"]) == shown["finalists"][0]["macs"]
    for row in parts["choices"]:
        assert row["mean"] <= row["best_mean"]
        assert row["factor"] in told.out
    again = edgekit("search", "resume", study, "--json")
    assert json.loads(again.out)["journal"] == shown["journal"]
    assert edgekit("search", "run", folder / "spec.toml", "-o", study).failed_with(1, "exists", "edgekit search resume")
    (folder / "recipe.toml").write_text('[[pass]]\nname = "cluster"\nbits = 5\nepochs = 0\n')
    small = edgekit("search", "resume", study, "--then-compress", folder / "recipe.toml")
    assert small.status == 0
    assert "packed bytes" in small.out
    assert (study / "compressed" / f"{key}.edge" / "edgekit.json").is_file()
    assert "<h2>Compressed</h2>" in (study / "report.html").read_text()
    assert json.loads(edgekit("search", "report", study, "--json").out)["journal"] == shown["journal"]
    twice = edgekit("search", "resume", study, "--then-compress", "auto")
    assert twice.failed_with(1, "the spec has a [compress] table")
    assert edgekit("search", "explain", study, "zzzz").failed_with(1, "0 networks of the study begin with 'zzzz'")
    assert edgekit("inspect", bundle).status == 0


def test_bad_calls_are_named(folder, edgekit, tmp_path):
    assert edgekit("search", "resume", tmp_path).failed_with(1, "holds no study", "edgekit search run")
    assert edgekit("search", "run", "-o", tmp_path / "x").failed_with(2, "--preset")
    assert edgekit("search", "run", "--preset", "resnet", "-o", tmp_path / "x").failed_with(
        1, "resnet", "turbovit-envelope"
    )
    assert edgekit("search", "run", tmp_path / "no.toml", "-o", tmp_path / "x").failed_with(1, "no such file")
    no_recipe = ("search", "run", folder / "spec.toml", "--then-compress", tmp_path / "none.toml")
    assert edgekit(*no_recipe, "-o", tmp_path / "x").failed_with(1, "no such recipe")
    no_rows = ("search", "run", "--preset", "turbovit-envelope", "--then-compress", "auto")
    assert edgekit(*no_rows, "-o", tmp_path / "x").failed_with(1, "[compress] needs [score] data")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_study_says_how_to_go_on(folder, tmp_path, number, status):
    text = (folder / "spec.toml").read_text().replace("candidates = 2", "candidates = 40")
    (tmp_path / "spec.toml").write_text(text)
    command = [
        sys.executable,
        "-c",
        "from edgekit.cli import main; main()",
        "search",
        "run",
        str(tmp_path / "spec.toml"),
    ]
    process = subprocess.Popen([*command, "-o", str(tmp_path / "study")], stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "study" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == status
    assert f"edgekit search resume {tmp_path / 'study'}" in told.replace("\n", "")
