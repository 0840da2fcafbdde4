"""`edgekit alerts classify`: exit statuses, one-line errors, and runs that are interrupted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from alert_broker.simulate import simulate, write
from edgekit.bundle.store import write_bundle
from tests.alert_broker.small import features_of, small_bundle


@pytest.fixture(scope="module")
def packets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packets") / "ztf"
    write(folder, simulate("ztf", 12, 0, cutouts=False), packets_per_file=1)
    return folder


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
    assert done.status == 0, done.err  # a corrupt packet is in the account, so it is no failure
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


# This runs the command line in a process that gets a signal while it decodes its 100th packet.
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


def test_a_file_name_that_is_not_utf_8_is_one_file_among_others(edgekit, model, packets, tmp_path):
    """Its bytes are escaped in the tables and on the terminal, as are those of a name that holds escape sequences."""
    folder = tmp_path / "night"
    folder.mkdir()
    data = sorted(path for path in packets.iterdir() if path.suffix == ".avro")
    good, bad = os.fsencode(folder) + b"/\xff\xfe.avro", os.fsencode(folder) + b"/\xfd\x1b[2J.avro"
    Path(os.fsdecode(good)).write_bytes(data[0].read_bytes())
    Path(os.fsdecode(bad)).write_bytes(b"Obj\x01 and no more")
    (folder / "z.avro").write_bytes(data[1].read_bytes())
    (folder / "\udce4.parquet").write_bytes(b"PAR1 and no more")
    out = tmp_path / "out.parquet"
    done = edgekit("alerts", "classify", folder, "-o", out, "--model", model)
    assert done.status == 0, done.err
    assert done.out.splitlines()[1].split() == ["4", "2", "0", "2"]
    files = sorted(Path(row["file"]).name for row in pq.read_table(out).to_pylist())
    assert files == [r"\xff\xfe.avro", "z.avro"]
    errors = pq.read_table(tmp_path / "out.errors.parquet").to_pylist()
    assert sorted(Path(row["file"]).name for row in errors) == ["\\xe4.parquet", "\\xfd\x1b[2J.avro"]
    assert "\x1b" not in done.out + done.err
    alone = edgekit("alerts", "classify", Path(os.fsdecode(bad)), "-o", tmp_path / "none.parquet", "--model", model)
    assert alone.status == 1
    gone = edgekit("alerts", "classify", tmp_path / "\x1b[2J.avro", "-o", tmp_path / "none.parquet", "--model", model)
    assert (gone.status, "\x1b" in gone.err) == (1, False)
    assert r"\x1b[2J.avro does not exist" in gone.err
