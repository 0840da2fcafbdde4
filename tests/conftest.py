"""What many tests build on: toy light curves, a tiny trained t2, a runtime and a clock that are not real."""

import functools
import logging
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("rises", "falls", "peaks")
TINY = {"bands": 2, "classes": 3, "sequence": 12, "embed_dim": 16, "heads": 4, "head_dim": 2, "ff_dim": 16}


def pytest_configure():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of a job that a script runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else the programs that tests start inherit it
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors; two threads only get into each other's way
    # The same examples in every run; what a random run finds is kept as an @example. No deadline: machines are shared.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


def pytest_collection_finish():
    """Let torch's exporter read its table of operators once, and not again for each graph, which takes 0.6 s."""
    if "torch" in sys.modules:
        from torch.onnx._internal.exporter._registration import ONNXRegistry

        ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data."""
    path = Path(os.environ.get("EDGEKIT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set EDGEKIT_SHARED_DATA")
    return path


def light_curves(samples: int, seed: int, *, sequence: int = 12, bands: int = 2):
    """Noisy light curves that rise, fall or peak, as a Dataset."""
    from edgekit.data.dataset import Dataset

    rng = np.random.default_rng(seed)
    labels = np.arange(samples) % 3
    time = np.linspace(0, 1, sequence)
    shapes = np.stack([time, 1 - time, 4 * time * (1 - time)])[labels]
    flux = rng.uniform(0.7, 1.3, (samples, 1, bands)) * shapes[:, :, None]
    flux += rng.normal(0, 0.4, flux.shape)
    return Dataset({"light_curve": flux.astype(np.float32)}, labels.astype(np.int64))


@pytest.fixture(scope="session")
def tiny_data():
    """(train, test) of the toy problem."""
    return light_curves(384, 1), light_curves(192, 2)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_data):
    """A t2 of a few hundred parameters, trained until it is right on nine light curves of ten."""
    import torch

    from edgekit.bundle.family import build
    from edgekit.bundle.format import Manifest, assemble
    from edgekit.bundle.tensors import TensorSpec
    from edgekit.nn.training import Schedule, fit, probabilities

    train, test = tiny_data
    torch.manual_seed(0)
    schedule = Schedule(epochs=20, batch=32, learning_rate=1e-2, averaging=0.9)
    model = fit(build("t2", TINY), train, schedule, seed=0)
    golden = test.take(np.arange(8))
    manifest = Manifest(
        name="tiny",
        family="t2",
        arguments=TINY,
        inputs=(TensorSpec("light_curve", ("batch", 12, 2), unit="scaled flux"),),
        outputs=(TensorSpec("probabilities", ("batch", 3)),),
        classes=CLASSES,
    )
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    outputs = {"probabilities": probabilities(model, golden)}
    return assemble(manifest, state, {}, (dict(golden.inputs), outputs))


@pytest.fixture
def tiny_candidate(tiny_bundle):
    from edgekit.passes.base import Candidate

    return Candidate("t2", TINY, tiny_bundle.model())


@pytest.fixture
def tiny_context(tiny_bundle, tiny_data):
    from edgekit.passes.base import Context

    return Context(tiny_data[0], tiny_bundle.model(), seed=5)


@pytest.fixture
def tiny_file(tiny_bundle, tmp_path) -> Path:
    """The tiny bundle on disk."""
    from edgekit.bundle.store import write_bundle

    write_bundle(tiny_bundle, tmp_path / "tiny.edge")
    return tmp_path / "tiny.edge"


@pytest.fixture
def data_file(tiny_data, tmp_path) -> Path:
    """The toy problem on disk, as `edgekit compress --data` takes it."""
    from edgekit.data.dataset import save

    train, test = tiny_data
    inputs = {"light_curve": np.concatenate([train.inputs["light_curve"], test.inputs["light_curve"]])}
    labels = np.concatenate([train.labels, test.labels])
    save(tmp_path / "toy.npz", inputs, labels, np.repeat([0, 1], [len(train), len(test)]))
    return tmp_path / "toy.npz"


@pytest.fixture
def register(monkeypatch):
    """register(group, name, thing): an entry point that exists for one test."""
    from edgekit import plugins

    extra = {}
    real_load, real_points = plugins.load, plugins._points

    def load(group, name, check=lambda found, name: ""):
        if (group, name) not in extra:
            return real_load(group, name, check)
        if problem := check(extra[group, name], name):
            raise plugins.refused(group, name, problem)
        return extra[group, name]

    monkeypatch.setattr(plugins, "load", load)
    monkeypatch.setattr(
        plugins, "_points", lambda group: real_points(group) | {name: None for where, name in extra if where == group}
    )
    return lambda group, name, thing: extra.__setitem__((group, name), thing)


class FakeSession:
    """A bundle run by torch. What one run is said to take, in seconds, is proportional to the number of parameters."""

    device = provider = "fake"

    def __init__(self, bundle, *, threads=None, chunk=None):
        self.inputs, self.outputs = bundle.manifest.inputs, bundle.manifest.outputs
        self.model = bundle.model().eval()
        self.seconds = 1e-6 * sum(value.size for value in bundle.weights().values())

    def run(self, arrays):
        import torch

        with torch.inference_mode():
            found = self.model(*map(torch.from_numpy, arrays.values()))
            return {self.outputs[0].name: found.softmax(dim=-1).numpy()}

    def warmup(self, batch):
        pass


@pytest.fixture
def fake_clock(monkeypatch):
    """The guard reads a session's `seconds`, with 2 % of reproducible noise, instead of the CPU's clock."""
    from edgekit.compression import guard

    rng = np.random.default_rng(0)
    monkeypatch.setattr(guard, "_thread_seconds", lambda session, rows: session.seconds * rng.normal(1.0, 0.02))


@pytest.fixture
def fake_runtime(register, fake_clock):
    """The runtime "fake"; its session class, for tests that need a worse one."""
    register("edgekit.sessions", "fake", FakeSession)
    return FakeSession


@pytest.fixture
def tiny_job(tiny_bundle, tiny_data, fake_runtime):
    """tiny_job(steps, ...): a compression job on the toy problem, measured on the fake runtime."""
    from edgekit.compression.guard import Limits
    from edgekit.compression.job import Job
    from edgekit.compression.recipe import Step

    def job(steps, *, max_loss=0.05, **options):
        recipe = [Step(name, parameters) for name, parameters in steps]
        limits = Limits(max_loss=max_loss, batches=(1, 16))
        return Job(tiny_bundle, recipe, *tiny_data, limits, **{"runtime": "fake", **options})

    return job


@dataclass
class Finished:
    status: int
    out: str
    err: str

    def failed_with(self, status: int, *words: str) -> bool:
        """One line for the person, no traceback, and the words that matter in it."""
        lines = self.err.strip().splitlines()
        assert self.status == status, (self.status, self.err)
        assert len(lines) == 1, self.err
        assert lines[0].startswith("edgekit: "), self.err
        assert all(word in lines[0] for word in words), (words, self.err)
        return True


@pytest.fixture
def edgekit(monkeypatch, capsys, tmp_path_factory):
    """edgekit("models", "--json"): the command line in this process; its exit status and what it printed. What it keeps
    for later goes to a folder of the test's own."""
    from edgekit.cli import main

    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    logger = logging.getLogger("edgekit")  # a command that serves a stream sets it up for the rest of its process
    before = list(logger.handlers), logger.level, logger.propagate

    def run(*arguments) -> Finished:
        monkeypatch.setattr(sys, "argv", ["edgekit", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(supervised=None)
        printed = capsys.readouterr()
        return Finished(stopped.value.code or 0, printed.out, printed.err)

    yield run
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture
def tiny():
    """The tiny model's arguments and its data's generator."""
    return SimpleNamespace(arguments=TINY, classes=CLASSES, light_curves=light_curves, Session=FakeSession)


@pytest.fixture
def toy():
    """toy(kind, ...): a t2 with random weights, its matrices encoded as `kind` says."""
    from tests.toys import toy_bundle

    return toy_bundle
