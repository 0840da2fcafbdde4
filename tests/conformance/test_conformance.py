"""Networks that break compressors and exporters go the whole way: import, compress, export, run, each with parity, its
constraints in the bundle, and a wrong length refused before it reaches a Reshape."""

import functools
import re
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.bundle.tensors import TensorSpec, golden_inputs, multiple, parse_spec
from edgekit.compression import run
from edgekit.compression.guard import Limits
from edgekit.compression.job import Job
from edgekit.compression.recipe import Step
from edgekit.data.dataset import UNKNOWN, Dataset
from edgekit.errors import EdgekitError
from edgekit.graph.lower import lower
from edgekit.graph.network import Network
from edgekit.importers.factory import from_factory
from edgekit.passes.base import GraphCandidate
from edgekit.passes.dynamic_int8 import DynamicInt8
from exporters.onnx_export import FLOAT, OnnxExporter
from tests.conformance.models import INPUTS, OUTPUTS, STATE

PARITY = 1e-5  # relative
NAMES = [name for name in INPUTS if name != "leaky_hourglass"]
# where torch-pruning finds units; the others say why not: tied, carried between calls, no layers
PRUNABLE = {"vit", "deit_tiny", "hourglass", "flow_step", "unet", "llama_block"}


def torchvision_without_kernels() -> None:
    """Define two operators that the import of PyPI's torchvision needs. It is built for CUDA, and they are missing if
    torch is built for CPUs."""
    try:
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_torchvision"] = library  # as long as it lives
    except RuntimeError:
        pass  # defined already: a torchvision that fits


def imported(name: str):
    """Return the network with random weights as a bundle."""
    if name == "deit_tiny":
        torchvision_without_kernels()
        pytest.importorskip("timm", reason="timm, or the torchvision that it imports, is not installed here")
    torch.manual_seed(0)
    bundle = from_factory(
        f"tests.conformance.models:{name}",
        arguments={},
        weights=None,
        outputs=OUTPUTS.get(name, ()),
        inputs=[parse_spec(f"{key}:{text}") for key, text in INPUTS[name].items()],
    )
    return replace(bundle, manifest=replace(bundle.manifest, name=name, state=STATE.get(name, {})))


def rows_of(bundle, rows: int, length: int = 2) -> dict[str, np.ndarray]:
    """Return random rows; every free axis has `length` times its multiple."""
    sized = tuple(
        replace(spec, shape=tuple(length * multiple(axis) if isinstance(axis, str) else axis for axis in spec.shape))
        for spec in bundle.manifest.inputs
    )
    return golden_inputs(sized, rows)


def in_torch(bundle, inputs) -> dict[str, np.ndarray]:
    with torch.inference_mode():
        values = Network(bundle).eval()(*(torch.from_numpy(array) for array in inputs.values()))
    return {spec.name: value.numpy() for spec, value in zip(bundle.manifest.outputs, values, strict=True)}


@functools.lru_cache(maxsize=2)
def session_of(content: bytes) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def in_onnxruntime(content: bytes, inputs) -> dict[str, np.ndarray]:
    session = session_of(content)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def difference(one, other) -> float:
    """Return the largest difference of the outputs, relative to the largest value; for codes, the share that
    differs."""
    found = []
    for name, want in other.items():
        if want.dtype.kind == "i":
            found.append(np.mean(one[name] != want))
        else:
            found.append(np.abs(one[name] - want).max() / np.abs(want).max())
    return float(max(found))


@pytest.fixture
def still_clock(monkeypatch):
    """Replace the clock: these tests do not test the times of calls."""
    from edgekit.compression import guard

    noise = np.random.default_rng(0)
    monkeypatch.setattr(guard, "_thread_seconds", lambda session, rows: session.run(rows) and noise.uniform(0.9, 1.1))


@pytest.fixture(scope="module", params=NAMES)
def bundle(request):
    return imported(request.param)


def test_a_network_goes_the_whole_way(bundle, still_clock, tmp_path):
    name = bundle.manifest.name
    prune = [Step("dependency_prune", {"sparsity": 0.5, "round_to": 4, "importance": "magnitude", "epochs": 0})]
    recipe = [*(prune if name in PRUNABLE else []), Step("magnitude_prune", {"sparsity": 0.2, "epochs": 0})]
    data = Dataset(rows_of(bundle, 16), np.full(16, UNKNOWN))
    # replayed: random networks have nothing to lose, and the guard would say so
    job = Job(bundle, recipe, data, data, Limits(batches=(1,)), "relative-error", "torch", replay=True)
    small = run.run(job, tmp_path / "work").bundle
    assert [(record["pass"], record["kept"]) for record in small.manifest.records] == [(s.name, True) for s in recipe]
    learnt = [sum(np.count_nonzero(value) for value in item.weights().values()) for item in (bundle, small)]
    assert learnt[1] < 0.9 * learnt[0]
    write_bundle(small, tmp_path / f"{name}.edge")
    small = open_bundle(tmp_path / f"{name}.edge")
    exported = OnnxExporter().export(small, tmp_path / "onnx")
    content = (tmp_path / "onnx" / FLOAT).read_bytes()
    free = any(isinstance(axis, str) for spec in small.manifest.inputs for axis in spec.shape[1:])
    for length in (1, 2, 5) if free else (2,):
        inputs = rows_of(small, 3, length)
        found, wanted = in_onnxruntime(content, inputs), in_torch(small, inputs)
        assert difference(found, wanted) < PARITY, length
        for spec in small.manifest.outputs:
            spec.check(found[spec.name])
    # the planted failure: the network before compression is another
    assert difference(in_torch(bundle, inputs), wanted) > PARITY
    tried = [check["lengths"] for check in exported.checks if check["lengths"]]
    assert bool(tried) == free


def test_dynamic_int8_runs_and_tells_what_it_left(bundle):
    model = lower(bundle)
    lowered = GraphCandidate(model)
    if bundle.manifest.name == "lfq_tokenizer":  # convolutions only
        with pytest.raises(EdgekitError, match="no MatMul or Gemm"):
            DynamicInt8().plan(lowered)
        return
    plan = DynamicInt8().plan(lowered)
    after = DynamicInt8().apply(lowered, None).model
    inputs = rows_of(bundle, 3)
    found = in_onnxruntime(after.SerializeToString(), inputs)
    assert 0 < difference(found, in_torch(bundle, inputs)) < 0.2
    planned = [change for change in plan if change.after.startswith("int8")]
    assert planned
    # each is stored in a byte instead of four, tied ones are not, and the plan says which are which
    saved = stored_bytes(model) - stored_bytes(after)
    numbers = sum(
        np.prod([int(axis) for axis in re.findall(r"\d+", change.before.split(")")[0])]) for change in planned
    )
    assert 2 * numbers < saved <= 3 * numbers
    if bundle.manifest.name in ("crate_block", "llama_block"):
        assert any("tied" in change.after for change in plan)


def stored_bytes(model: onnx.ModelProto) -> int:
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in model.graph.initializer)


@pytest.mark.parametrize(
    ("name", "axis", "wrong", "nearest"),
    [
        ("hourglass", 1, 20, "18 or 27"),
        ("hourglass", 1, 4, "(9)"),
        ("unet", 2, 10, "8 or 12"),
        ("unet", 3, 13, "12 or 16"),
    ],
)
def test_a_wrong_length_is_refused_with_the_nearest_right_ones(name, axis, wrong, nearest):
    bundle = imported(name)
    inputs = rows_of(bundle, 1)
    spec = bundle.manifest.inputs[0]
    shape = list(inputs[spec.name].shape)
    shape[axis] = wrong
    with pytest.raises(EdgekitError) as refused:
        spec.check(np.zeros(shape, spec.dtype))
    step = multiple(spec.shape[axis])
    assert f"length {wrong} along axis {axis}; this model needs a multiple of {step}" in str(refused.value)
    assert nearest in str(refused.value)


def test_lengths_of_outputs_follow_those_of_inputs():
    def shapes(name):
        return [spec.shape for spec in imported(name).manifest.outputs]

    assert shapes("hourglass") == [("batch", "9*faces", 16)]
    assert shapes("unet") == [("batch", 1, "4*rows", "4*columns")]
    assert shapes("lfq_tokenizer") == [("batch", "frames", 4, 4), ("batch", 3, 2, 8, 8), ("batch", 16, 2, 4, 4)]
    assert shapes("flow_step") == [("batch", "atoms", 3)]


@pytest.mark.parametrize(("name", "leaks"), [("hourglass", False), ("leaky_hourglass", True)])
def test_no_token_hears_of_a_later_one(name, leaks):
    """The test uses the exported graph. Without the shift the network leaks, which the test must find."""
    bundle = imported(name)
    graph = lower(bundle).SerializeToString()
    ids = np.random.default_rng(0).integers(0, 16, (1, 54))
    before = in_onnxruntime(graph, {"ids": ids})["output"]
    worst = 0.0
    for at in range(1, 54):
        changed = ids.copy()
        changed[0, at:] = (changed[0, at:] + 1) % 16
        after = in_onnxruntime(graph, {"ids": changed})["output"]
        worst = max(worst, float(np.abs(after - before)[0, :at].max()))
    assert (worst > 0.05) if leaks else (worst == 0.0)


def test_chunks_with_carried_state_are_the_whole_clip():
    bundle = imported("lfq_tokenizer")
    assert bundle.manifest.state == {"before1": "after1", "before2": "after2"}
    graph = lower(bundle).SerializeToString()
    video = np.random.default_rng(0).normal(size=(2, 3, 12, 8, 8)).astype(np.float32)
    start = {spec.name: np.zeros((2, *spec.shape[1:]), np.float32) for spec in bundle.manifest.inputs[1:]}
    whole = in_onnxruntime(graph, {"video": video, **start})["codes"]

    def streamed(carry):
        state, codes, at = start, [], 0
        for frames in (1, 3, 5, 3):
            found = in_onnxruntime(graph, {"video": video[:, :, at : at + frames], **state})
            codes.append(found["codes"])
            at += frames
            state = {name: found[to] for name, to in bundle.manifest.state.items()} if carry else start
        return np.concatenate(codes, axis=1)

    assert np.array_equal(streamed(carry=True), whole)
    assert np.mean(streamed(carry=False) != whole) > 0.1, "without its state each chunk starts in the dark"
    assert whole.min() >= 0
    assert whole.max() < 2**18


def test_a_turned_molecule_flows_to_the_turned_place():
    bundle = imported("flow_step")
    graph = lower(bundle).SerializeToString()
    rng = np.random.default_rng(0)
    inputs = {
        "positions": rng.normal(size=(2, 7, 3)).astype(np.float32),
        "kinds": np.eye(4, dtype=np.float32)[rng.integers(0, 4, (2, 7))],
        "time": rng.uniform(size=(2, 1)).astype(np.float32),
    }
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved = inputs | {"positions": (inputs["positions"] @ turn.T + 0.5).astype(np.float32)}
    straight, turned = (in_onnxruntime(graph, item)["output"] for item in (inputs, moved))
    assert np.abs(straight @ turn.T + 0.5 - turned).max() < 1e-5
    stretched = inputs | {"positions": inputs["positions"] * np.float32([1, 1, 2])}
    assert np.abs(straight * [1, 1, 2] - in_onnxruntime(graph, stretched)["output"]).max() > 1e-3
    state = inputs["positions"]
    for _ in range(8):  # eight steps of the loop, host side, in both runtimes
        state = in_onnxruntime(graph, inputs | {"positions": state})["output"]
    network = Network(bundle).eval()
    expected = torch.from_numpy(inputs["positions"])
    with torch.inference_mode():
        for _ in range(8):
            (expected,) = network(expected, *(torch.from_numpy(inputs[name]) for name in ("kinds", "time")))
    assert np.abs(state - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("name", ["crate_block", "llama_block"])
def test_a_tied_matrix_is_stored_once(name, tmp_path):
    bundle = imported(name)
    network = bundle.model()
    once = 4 * sum(value.numel() for value in network.parameters())
    OnnxExporter().export(bundle, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / FLOAT)
    stored = sum(np.prod(tensor.dims) * 4 for tensor in model.graph.initializer)
    assert once <= stored < once + 1024, "the parameters, and some shapes and constants"
    tied = {"crate_block": "0.dictionary", "llama_block": "embed.weight"}[name]
    readers = [node.op_type for node in model.graph.node if tied in node.input]
    assert "Transpose" in readers
    assert len(readers) > 1


def test_the_router_is_no_parameter_and_chooses_two():
    bundle = imported("mixture")
    network = bundle.model()
    assert "router" not in dict(network.named_parameters())
    inputs = rows_of(bundle, 2, 6)
    scores = inputs["tokens"] @ network.router.numpy()
    alone = np.zeros_like(inputs["tokens"])
    for expert in range(4):  # by hand: the two best, softmax over them
        best = np.sort(scores, axis=-1)[..., -2:]
        share = np.where(scores[..., expert] >= best[..., 0], np.exp(scores[..., expert]) / np.exp(best).sum(-1), 0)
        first, second = (network.get_parameter(key)[expert].detach().numpy() for key in ("first", "second"))
        alone += share[..., None] * (np.maximum(inputs["tokens"] @ first, 0) @ second)
    found = in_onnxruntime(lower(bundle).SerializeToString(), inputs)["output"]
    assert np.abs(found - inputs["tokens"] - alone).max() < 1e-5


def baked() -> torch.nn.Module:
    """Return a network whose code converts a length to a number, which tracing makes a constant."""

    class Baked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x):
            return torch.stack([x[:, at] * self.weight for at in range(int(x.shape[1]))]).mean(dim=0)

    return Baked()


def test_a_length_that_tracing_made_a_constant_is_noticed(tmp_path):
    bundle = from_factory(
        f"{__name__}:baked",
        arguments={},
        weights=None,
        outputs=(),
        inputs=[TensorSpec("x", ("batch", "tokens", 4))],
    )
    with pytest.raises(EdgekitError, match="the tracer stored a length as a constant"):
        OnnxExporter().export(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def thirds() -> torch.nn.Module:
    """Return a network that merges three tokens into one."""

    class Thirds(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(12, 4)

        def forward(self, x):
            return self.layer(x.reshape(x.shape[0], x.shape[1] // 3, 12)).relu()

    return Thirds()


def test_the_other_exporter_takes_multiples_too():
    bundle = from_factory(
        f"{__name__}:thirds",
        arguments={},
        weights=None,
        outputs=(),
        inputs=[TensorSpec("x", ("batch", "3*vertices", 4))],
    )
    assert bundle.manifest.outputs[0].shape == ("batch", "vertices", 4)
    graph = lower(bundle, exporter="dynamo").SerializeToString()
    for length in (1, 5):
        inputs = rows_of(bundle, 3, length)
        assert difference(in_onnxruntime(graph, inputs), in_torch(bundle, inputs)) < PARITY
