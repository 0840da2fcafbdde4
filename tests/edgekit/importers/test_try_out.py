"""A graph from a file runs in a confined process before it runs in this one, and once only."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from edgekit.bundle import zoo
from edgekit.bundle.format import GRAPH, assemble_graph
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError
from edgekit.importers import onnx as importer
from edgekit.importers import sandbox
from edgekit.importers.api import open_model, open_to_run
from tests.edgekit.importers.test_hostile_onnx import loop, wide

COMMANDS = {
    "run": ["run", "x.edge", "--inputs", "x.npz", "--outputs", "y.npz", "--runtime", "onnxruntime"],
    "bench": ["bench", "x.edge", "--batch", "1", "--seconds", "0.05"],
    "compress": ["compress", "x.edge", "--data", "x.npz", "--auto", "-o", "y.edge"],
    "export": ["export", "x.edge", "--to", "onnx", "-o", "y", "--json"],
    "doctor": ["doctor", "x.edge"],
}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """file(graph): a bundle on disk that holds the graph, whatever it does."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", x=np.ones((4, 2), np.float32), labels=np.zeros(4, np.int64), split=np.arange(4) % 2)
    honest = importer.from_onnx(loop(3), "x", "x.onnx")

    def write(graph):
        bundle = assemble_graph(replace(honest.manifest), graph, honest.golden())
        return write_bundle(bundle, tmp_path / "x.edge", force=True).path

    return write


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_loop_without_end_is_stopped(command, file, edgekit, monkeypatch, tmp_path):
    monkeypatch.setenv(sandbox.VARIABLE, "1")
    file(loop(1 << 62))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert edgekit(*command).failed_with(1, "x.edge: it takes more than 1 s", "--time-limit SECONDS")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_consumer_of_a_stream_tries_its_model(file, monkeypatch):
    classifiers = pytest.importorskip("alert_broker.stream.classifiers")
    monkeypatch.setenv(sandbox.VARIABLE, "1")
    hostile = str(file(loop(1 << 62)))
    for model, cutouts in ((hostile, ""), ("", hostile)):
        config = SimpleNamespace(model=SimpleNamespace(bundle=model), cutouts=SimpleNamespace(model=cutouts))
        with pytest.raises(EdgekitError, match=r"x\.edge: it takes more than 1 s"):
            classifiers.open_all_classifiers(config, None, print)


def test_a_graph_that_fills_the_memory_is_refused(file):
    path = file(wide(20 << 30))
    with pytest.raises(EdgekitError, match=r"x\.edge: .*(memory|alloc|signal)"):
        open_to_run(path)
    assert open_model(path).is_graph, "it can be inspected"


def test_a_graph_runs_once(file, monkeypatch):
    runs = []
    confined = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *arguments: runs.append(1) or confined(*arguments))
    path = file(loop(3))
    assert open_to_run(path).digest == open_to_run(path).digest
    assert len(runs) == 1
    open_to_run(file(loop(5)))
    assert len(runs) == 2, "another graph"
    monkeypatch.setenv("EDGEKIT_CACHE", "/dev/null/no-folder")
    open_to_run(path)
    open_to_run(path)
    assert len(runs) == 4, "without a cache nothing is remembered"


def test_a_graph_that_failed_is_not_remembered(file, monkeypatch):
    monkeypatch.setenv(sandbox.VARIABLE, "1")
    path = file(loop(1 << 62))
    for _ in range(2):
        with pytest.raises(EdgekitError, match="more than 1 s"):
            open_to_run(path)


def test_what_holds_no_graph_of_a_stranger_is_not_run(file, monkeypatch, tiny_file):
    monkeypatch.setattr(sandbox, "run", lambda *arguments: pytest.fail("it runs"))
    open_to_run(tiny_file)
    honest = open_bundle(file(loop(3)))
    open_to_run(replace(honest, path=None))  # made in this process
    monkeypatch.setattr(zoo, "folders", lambda: {"x": honest.path.resolve()})
    assert GRAPH in open_to_run(honest).contents
