"""`edgekit alerts`: exit statuses, one-line errors, and runs that are interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alert_broker.commands.common import stopping
from alert_broker.simulate import simulate, write
from edgekit.bundle.store import write_bundle
from tests.alert_broker.small import features_of, small_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.edge"
    write_bundle(small_bundle(), path)
    return path


@pytest.fixture(scope="module")
def packets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packets") / "ztf"
    write(folder, simulate("ztf", 12, 0, cutouts=False), packets_per_file=1)
    return folder


# --- classify


def test_a_run_prints_its_account(edgekit, model, packets, tmp_path):
    done = edgekit("alerts", "classify", packets, "-o", tmp_path / "out.parquet", "--model", model)
    assert done.status == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["in", "classified", "skipped", "corrupt"]
    assert lines[1] == ["12", "12", "0", "0"]
    assert f"{tmp_path / 'out.parquet'}: 12 rows" in done.out
    assert len(pq.read_table(tmp_path / "out.parquet")) == 12


def test_json_is_all_of_the_output(edgekit, model, packets, tmp_path):
    (tmp_path / "bad.avro").write_bytes(b"Obj\x01")
    out, errors = tmp_path / "out.parquet", tmp_path / "why.parquet"
    done = edgekit(
        "alerts",
        "classify",
        packets,
        tmp_path / "bad.avro",
        "-o",
        out,
        "--errors",
        errors,
        "--model",
        model,
        "--json",
        "--batch",
        5,
        "--runtime",
        "torch",
    )
    assert done.status == 0, done.err  # a corrupt packet is accounted for
    told = json.loads(done.out)
    assert (told["in"], told["classified"], told["corrupt"], told["stopped"]) == (13, 12, 1, False)
    assert (told["output"], told["errors"]) == (str(out), str(errors))
    assert told["runtime"].startswith("torch")
    assert pq.read_table(errors).to_pylist()[0]["file"] == str(tmp_path / "bad.avro")


def test_default_models_come_from_the_zoo(edgekit, model, packets, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.bundle.zoo.folders", lambda: {"t2-gr": model, "t2-ugrizy": model})
    done = edgekit("alerts", "classify", packets, "-o", tmp_path / "out.parquet", "--json")
    assert done.status == 0, done.err
    assert json.loads(done.out)["models"].keys() == {"small"}


def test_nothing_that_can_be_read_is_an_error_with_its_account(edgekit, model, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.avro").write_text("no packet")
    done = edgekit("alerts", "classify", tmp_path / "in", "-o", tmp_path / "out.parquet", "--model", model, "--json")
    assert done.failed_with(1, "no alert could be read from 1 files", "out.errors.parquet")
    assert json.loads(done.out)["corrupt"] == 1
    assert "no packet" not in pq.read_table(tmp_path / "out.errors.parquet").to_pylist()[0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["no-such-folder"], 1, ["no-such-folder does not exist"]),
        (["{empty}"], 1, ["holds no files"]),
        (["{packets}", "--model", "no-such-model"], 1, ["unknown model 'no-such-model'"]),
        (["{packets}", "--model", "{tampered}"], 1, ["SHA-256", "changed or damaged"]),
        (["{packets}", "--model", "{redshift}"], 1, ["redshift", "t2-ugrizy"]),
        (["{packets}", "--runtime", "cuda"], 1, ["unknown runtime 'cuda'"]),
        (["{packets}", "-o", "out.csv"], 1, ["out.csv does not end in .parquet"]),
        (["{packets}", "-o", "{taken}"], 1, ["already exists", "--force"]),
        (["{packets}", "--batch", "0"], 2, ["0", "--help"]),
        ([], 2, ["PATHS"]),
    ],
)
def test_mistakes_take_one_line(edgekit, model, packets, tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.setattr("edgekit.bundle.zoo.folders", lambda: {"t2-gr": model, "t2-ugrizy": model})
    places = {"packets": packets, "empty": tmp_path / "empty", "taken": tmp_path / "taken.parquet"}
    places["empty"].mkdir()
    places["taken"].write_text("x")
    places["tampered"] = tmp_path / "tampered.edge"
    write_bundle(small_bundle(), places["tampered"])
    (places["tampered"] / "weights.safetensors").write_bytes(b"no")
    places["redshift"] = tmp_path / "redshift.edge"
    write_bundle(small_bundle(features=features_of(context=("log_span", "redshift"))), places["redshift"])
    given = [argument.format_map(places) for argument in arguments]
    defaults = {"-o": tmp_path / "out.parquet", "--model": model}
    given += [str(item) for name, value in defaults.items() if name not in given for item in (name, value)]
    assert edgekit("alerts", "classify", *given).failed_with(status, *words)
    assert not (tmp_path / "out.parquet").exists()
    assert places["taken"].read_text() == "x"


# --- interruption


def test_the_first_signal_asks_and_the_second_insists():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stopping() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# The command line, in a process that is sent a signal while it decodes its 100th packet.
INTERRUPTED = """
import os, sys
from alert_broker.avro.columns import Columns
from edgekit.cli import main

read, seen, number = Columns.read, [], int(sys.argv.pop(1))

def interrupted(columns, data, count, *plan):
    seen.append(count)
    if len(seen) == 100:
        os.kill(os.getpid(), number)
    return read(columns, data, count, *plan)

Columns.read = interrupted
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_keep_what_is_done(model, packets, tmp_path, number):
    night = tmp_path / "night"
    night.mkdir()
    files = sorted(packets.glob("*.avro"))
    for index in range(300):
        os.link(files[index % len(files)], night / f"{index}.avro")
    out = tmp_path / "out.parquet"
    command = [sys.executable, "-c", INTERRUPTED, str(int(number)), "alerts", "classify", str(night), "-o", str(out)]
    done = subprocess.run(
        [*command, "--model", str(model), "--json", "--batch", "16"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "edgekit: stopped; the files hold the results up to this point"
    told = json.loads(done.stdout)
    rows = pq.read_table(out)
    assert told["stopped"]
    assert told["in"] == told["classified"] == len(rows)
    assert 90 < len(rows) < 110
    assert rows["status"].to_pylist() == ["classified"] * len(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["night", "out.errors.parquet", "out.parquet"]


# --- simulate


@pytest.mark.parametrize(("survey", "per_file", "files"), [("ztf", 5, 3), ("lsst", 1, 12)])
def test_simulated_packets_can_be_classified(edgekit, model, tmp_path, survey, per_file, files):
    folder = tmp_path / "sky" / survey
    arguments = ["alerts", "simulate", "-o", folder, "--survey", survey, "--count", 12, "--no-cutouts"]
    done = edgekit(*arguments, "--per-file", per_file)
    assert done.status == 0, done.err
    assert f"12 simulated {survey} alerts in {files} files" in done.out
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
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first  # the same seed, the same bytes
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
    ],
)
def test_what_cannot_be_simulated(edgekit, tmp_path, options, status, words):
    assert edgekit("alerts", "simulate", "-o", tmp_path / "sky", *options).failed_with(status, *words)
    assert not list(tmp_path.iterdir())
