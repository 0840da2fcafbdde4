"""`edgekit alerts simulate`: its packets can be classified, and it replaces a folder only if it wrote the folder."""

import json

import pyarrow.parquet as pq
import pytest


@pytest.mark.parametrize(("survey", "per_file", "files"), [("ztf", 5, 3), ("ztf", 12, 1), ("lsst", 1, 12)])
def test_simulated_packets_can_be_classified(edgekit, model, tmp_path, survey, per_file, files):
    folder = tmp_path / "sky" / survey
    arguments = ["alerts", "simulate", "-o", folder, "--survey", survey, "--count", 12, "--no-cutouts"]
    done = edgekit(*arguments, "--per-file", per_file)
    assert done.status == 0, done.err
    assert f"12 simulated {survey} alerts in {files} {'file' if files == 1 else 'files'}, " in done.out
    assert len(list(folder.iterdir())) == files + 1
    done = edgekit("alerts", "classify", folder, "-o", tmp_path / "out.parquet", "--model", model, "--json")
    assert json.loads(done.out)["classified"] == 12
    truth = pq.read_table(folder / "truth.parquet")
    rows = pq.read_table(tmp_path / "out.parquet")
    assert sorted(rows["alert_id"].to_pylist()) == sorted(truth["alert_id"].to_pylist())


def test_a_folder_is_replaced_only_when_asked_and_ours(edgekit, tmp_path):
    folder = tmp_path / "sky"
    command = ["alerts", "simulate", "-o", folder, "--survey", "ztf", "--count", 3, "--no-cutouts"]
    assert edgekit(*command).status == 0
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert edgekit(*command, "--seed", 1).failed_with(1, "already exists", "--force")
    assert edgekit(*command, "--seed", 1, "--force").status == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} != first
    assert edgekit(*command, "--force").status == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first  # the same seed gives the same bytes
    (folder / "thesis.tex").write_text("x")
    assert edgekit(*command, "--force").failed_with(1, "holds other files than simulated alerts")
    assert (folder / "thesis.tex").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sky"]


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["--survey", "ztff", "--count", "1"], 1, ["unknown survey 'ztff'", "did you mean 'ztf'"]),
        (["--survey", "ztf", "--count", "0"], 1, ["expected 1 alert or more"]),
        (["--survey", "ztf", "--count", "1", "--per-file", "0"], 1, ["packets per file is 0"]),
        (["--survey", "ztf"], 2, ["--count"]),
        (["--survey", "ztf", "--count", "1", "--to-topic", "a"], 2, ["either --output FOLDER or --to-topic TOPIC"]),
    ],
)
def test_what_cannot_be_simulated(edgekit, tmp_path, options, status, words):
    assert edgekit("alerts", "simulate", "-o", tmp_path / "sky", *options).failed_with(status, *words)
    assert not list(tmp_path.iterdir())


def test_alerts_without_a_destination_are_refused(edgekit):
    done = edgekit("alerts", "simulate", "--survey", "ztf", "--count", 1)
    assert done.failed_with(2, "either --output FOLDER or --to-topic TOPIC")


def test_a_run_that_fails_leaves_no_folder_and_the_old_one_as_it_was(edgekit, tmp_path, monkeypatch):
    folder = tmp_path / "sky"
    command = ["alerts", "simulate", "-o", folder, "--survey", "ztf", "--count", 2, "--no-cutouts"]
    assert edgekit(*command).status == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alert_broker.simulated_packets.write_file", full)
    assert edgekit(*command, "--seed", 1, "--force").failed_with(1, "No space left on device")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["sky"]


def test_alerts_to_a_topic_are_sent_as_the_survey_would(edgekit, sent):
    done = edgekit("alerts", "simulate", "--survey", "lsst", "--count", 3, "--no-cutouts", "--to-topic", "night",
                   "--kafka", "bootstrap.servers=x:1", "--rate", 5)  # fmt: skip
    assert done.status == 0, done.err
    assert "night: 3 packets" in done.out
    (call,) = sent
    assert (call.topic, call.settings, call.rate) == ("night", {"bootstrap.servers": "x:1"}, 5.0)
    assert [packet[:1] for packet in call.packets] == [b"\0"] * 3
