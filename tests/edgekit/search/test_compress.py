"""`edgekit.compress`: every form of a model and of its data, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import edgekit
from edgekit.bundle.store import open_bundle
from edgekit.compression import recipe
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.search.compress import check_replay, compress, job_of

STEPS = [("cluster", {"bits": 5, "epochs": 0})]
OPTIONS = {"recipe": STEPS, "runtime": "torch", "batches": (1,), "max_loss": 0.2, "objective": "size"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("edgekit.compression.guard._thread_seconds", lambda session, rows: session.run(rows) and 0.1)
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 96), torch.nn.ReLU(), torch.nn.Linear(96, 3)).eval()


@pytest.fixture(scope="module")
def rows(network):
    inputs = np.random.default_rng(0).normal(size=(240, 16))
    labels = network(torch.tensor(inputs, dtype=torch.float32)).argmax(1).numpy()
    return inputs, labels


def forms(rows):
    inputs, labels = rows
    tensors = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    single = inputs.astype(np.float32)
    return {
        "NumPy pair": (inputs, labels),
        "torch pair": tensors,
        "mapping": {"input": inputs, "labels": labels},
        "mapping with a split": {"input": inputs, "labels": labels, "split": np.arange(240) % 2},
        "inputs by name": ({"input": inputs}, labels),
        "DataLoader": DataLoader(TensorDataset(*tensors), batch_size=32),
        "torch Dataset": TensorDataset(*tensors),
        "Dataset": Dataset({"input": single}, labels),
        "training and test": ((inputs[:150], labels[:150]), (inputs[150:], labels[150:])),
        "two loaders": tuple(
            DataLoader(TensorDataset(t[0][s], t[1][s])) for t in [tensors] for s in (slice(150), slice(150, None))
        ),
    }


@pytest.mark.parametrize("form", [*forms((np.zeros((240, 16)), np.zeros(240, int)))])
def test_every_form_of_data_is_the_same_data(form, network, rows):
    said = []
    job = job_of(network, data=forms(rows)[form], recipe=STEPS, runtime="torch", notify=said.append)
    assert job.metric == "error-rate"
    assert job.train.inputs["input"].dtype == np.float32
    assert len(job.train) + len(job.test) == 240
    together = np.concatenate([job.train.inputs["input"], job.test.inputs["input"]])
    assert np.allclose(np.sort(together.sum(1)), np.sort(rows[0].sum(1)), atol=1e-4)
    for part in (job.train, job.test):  # each row kept its own label
        assert (network(torch.from_numpy(part.inputs["input"])).argmax(1).numpy() == part.labels).all()
    told = any("60 of 240 rows are held out" in line for line in said)
    assert told == (form not in ("mapping with a split", "training and test", "two loaders"))


def test_the_held_out_rows_follow_the_seed(network, rows):
    first, again, other = (job_of(network, data=rows, recipe=STEPS, seed=seed).test.labels for seed in (0, 0, 1))
    assert (first == again).all()
    assert not np.array_equal(first, other)


def test_a_torch_network_is_compressed_and_saved_as_a_graph_that_opens_elsewhere(network, rows, tmp_path):
    result = compress(network, data=rows, output=tmp_path / "small.edge", **OPTIONS)
    assert [record.kept for record in result.records] == [True]
    assert result.packed_bytes < 0.6 * result.source_packed_bytes
    assert result.quality.value <= 0.2
    probe = (
        "import sys, numpy, edgekit; s = edgekit.Session(sys.argv[1], 'onnxruntime'); "
        "print(s.run({'input': numpy.ones((1, 16), 'float32')})['output'].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, str(tmp_path / "small.edge")], capture_output=True, text=True, check=True
    )
    written = open_bundle(tmp_path / "small.edge")
    assert written.is_graph
    (expected,) = edgekit.Session(written, "onnxruntime").run({"input": np.ones((1, 16), np.float32)}).values()
    assert np.allclose(ast_list(done.stdout), expected, atol=1e-5)
    exact = network(torch.ones(1, 16)).detach().numpy()
    assert 0 < np.abs(exact - expected).max() < 0.5, "clustered, and still the same network"


def ast_list(text):
    import ast

    return np.array(ast.literal_eval(text))


def test_training_the_network_later_does_not_change_the_bundle(rows):
    network = torch.nn.Sequential(torch.nn.Linear(16, 3))
    bundle = edgekit.import_module(network, inputs={"input": rows[0][:2]})
    with torch.no_grad():
        network[0].weight.zero_()
    assert np.abs(bundle.weights()["0.weight"]).max() > 0
    assert np.abs(bundle.model()[0].weight.detach().numpy()).max() > 0


def test_pruned_steps_replay_on_the_copy(network, rows):
    pytest.importorskip("torch_pruning")
    steps = [("dependency_prune", {"sparsity": 0.5, "importance": "magnitude", "epochs": 0}), *STEPS]
    result = compress(network, data=rows, **{**OPTIONS, "recipe": steps, "max_loss": 1.0})
    assert [record.kept for record in result.records] == [True, True]
    assert result.bundle.model()[0].out_features == 48
    assert network[0].out_features == 96


def test_a_network_with_a_factory_stays_one(network, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_own_network.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 3))\n"
    )
    bundle = edgekit.import_module(network, inputs=["x:float32:batch,16"], factory="my_own_network:build")
    from edgekit.importers.live import portable

    assert portable(bundle) is bundle
    assert np.array_equal(bundle.weights()["0.weight"], network[0].weight.detach().numpy())


def test_a_live_network_of_another_process_is_an_error_that_says_so(network, rows, monkeypatch):
    from edgekit.nn import live

    bundle = edgekit.import_module(network, inputs={"input": rows[0][:2]})
    monkeypatch.setattr(live, "_networks", {})
    with pytest.raises(EdgekitError, match="only the process that registered it"):
        bundle.model()


def test_a_zoo_model_with_arrays(tiny_bundle, tiny_data, fake_runtime):
    train, test = tiny_data
    result = compress(tiny_bundle, data=(train, test), **{**OPTIONS, "runtime": "fake"})
    assert result.summary.metric == "class-averaged log-loss"
    assert result.original.samples == len(test)


def test_a_replay_gives_the_same_bytes_and_a_planted_other_seed_does_not(
    tiny_bundle, tiny_data, fake_runtime, tmp_path
):
    from dataclasses import replace

    from edgekit.compression.trials import Constraints
    from edgekit.search.compress import carry_out

    steps = [("cluster", {"bits": 4, "epochs": 1})]
    options = {"data": tiny_data, "runtime": "fake", "batches": (1,), "max_loss": 0.2}
    made = compress(tiny_bundle, recipe=steps, output=tmp_path / "made.edge", **options)
    job = job_of(tiny_bundle, replay=tmp_path / "made.edge", **options)
    check_replay(carry_out(job, Constraints(0.2)), made.bundle)
    other = replace(job, recipe=[replace(job.recipe[0], seed=99)])
    with pytest.raises(EdgekitError, match="the replay gave other bytes than"):
        check_replay(carry_out(other, Constraints(0.2)), made.bundle)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": None}, "a torch network needs data in memory"),
        ({"data": "rows.npz"}, "a torch network needs data in memory"),
        ({"data": 7}, "data of the type int; expected .inputs, labels."),
        ({"recipe": None}, "has no recipe of its own"),
        ({"recipe": [("clustr", {})]}, "unknown pass 'clustr'"),
        ({"recipe": [("cluster", {"bit": 3})]}, "unknown parameter 'bit'"),
        ({"max_loss": -1.0}, "max_loss = -1.0; expected"),
        ({"max_loss": float("inf")}, "max_loss = inf; expected"),
        ({"max_size": 0}, "max_size = 0; expected"),
        ({"max_latency": 1.0}, "max_latency is for a search"),
        ({"auto": True}, "leave recipe out"),
        ({"target": "no-such"}, "no-such"),
        ({"objective": "beauty"}, "unknown objective 'beauty'"),
        ({"batches": ()}, "batch sizes"),
    ],
)
def test_a_mistake_is_an_error_before_the_work(options, words, network, rows):
    said = []
    with pytest.raises(EdgekitError, match=words):
        compress(network, **{"data": rows, **OPTIONS, **options}, notify=said.append)
    assert not any(line.startswith("pass ") for line in said)


def test_an_output_that_exists_is_refused_before_the_work(network, rows, tmp_path):
    with pytest.raises(EdgekitError, match="already exists"):
        compress(network, data=rows, output=tmp_path, **OPTIONS)


def test_steps_in_every_form(network, rows, tmp_path):
    (tmp_path / "recipe.toml").write_text(recipe.to_toml([recipe.Step("cluster", {"bits": 5, "epochs": 0})]))
    forms = [STEPS, [{"name": "cluster", "bits": 5, "epochs": 0}], [recipe.Step(*STEPS[0])], tmp_path / "recipe.toml"]
    assert all(
        list(job_of(network, data=rows, recipe=form).recipe) == [recipe.Step("cluster", {"bits": 5, "epochs": 0})]
        for form in forms
    )
