"""OpenVINO as a session: the network's numbers at any batch, shapes compiled once, and never another precision."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from edgekit.bundle.store import write_bundle
from edgekit.bundle.tensors import golden_inputs
from edgekit.errors import EdgekitError
from edgekit.graph.lower import lower
from edgekit.graph.network import Network
from edgekit.importers.onnx import from_onnx
from edgekit.session import open_session
from runtimes.sessions.c_session import check_golden
from tests.toys import toy_bundle

module = pytest.importorskip("runtimes.sessions.openvino_session", exc_type=EdgekitError)
from exporters.openvino_export import MODEL, OpenVinoExporter  # noqa: E402

Session = module.OpenVinoSession
MODELS = {
    "plain": toy_bundle(),
    "context": toy_bundle(context=2),
    "pruned heads": toy_bundle(heads=3, context=1),
    "affine": toy_bundle("affine rows"),
    "palette": toy_bundle("palette"),
    "logits": toy_bundle(output="logits"),
}


def exact(bundle, inputs) -> np.ndarray:
    """Return the outputs of the network in float64."""
    with torch.inference_mode():
        tensors = [torch.from_numpy(array).double() for array in inputs.values()]
        return Network(bundle).eval().double()(*tensors)[0].numpy()


@pytest.mark.parametrize("bundle", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("options", [{}, {"threads": 1, "chunk": 256}, {"threads": 3, "chunk": 4}], ids=str)
def test_any_batch_gives_the_networks_outputs_in_order(bundle, options):
    session = Session(bundle, **options)
    name = bundle.manifest.outputs[0].name
    inputs = golden_inputs(bundle.manifest.inputs, 53)
    expected = exact(bundle, inputs)
    assert np.abs(expected - np.roll(expected, 1, axis=0)).max() > 1e-4, "an exchange of rows would not show"
    for rows in (0, 1, 7, 16, 53):
        got = session.run({key: array[:rows] for key, array in inputs.items()})
        assert list(got) == [name]
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], expected[:rows], atol=2e-6)
    strided = {key: np.repeat(array, 2, axis=0)[::2] for key, array in inputs.items()}
    assert np.array_equal(session.run(strided)[name], got[name])


@pytest.mark.parametrize("name", ["context", "affine"])
def test_a_graph_runs_as_its_network_does(name):
    """This also holds if the graph stores weights as integers, with which OpenVINO would round activations to int8."""
    bundle = MODELS[name]
    inputs, expected = bundle.golden()
    graph = from_onnx(lower(bundle).SerializeToString(), "graph", "a test", golden=inputs)
    got = Session(graph, threads=1).run(inputs)["probabilities"]
    np.testing.assert_allclose(got, expected["probabilities"], atol=1e-6)


def test_a_changed_weight_shows():
    """The planted failure: a session of another network does not give this bundle's golden outputs."""
    bundle = MODELS["plain"]
    check_golden(Session(bundle, threads=1), bundle)
    for other in ("pruned heads", "affine"):
        session = Session(MODELS[other], threads=1)
        names = [spec.name for spec in session.inputs]
        run = session.run
        extra = golden_inputs(session.inputs, 6)
        session.run = lambda rows, run=run, names=names, extra=extra: run(
            {name: rows.get(name, extra[name][: len(rows["light_curve"])]) for name in names}
        )
        with pytest.raises(EdgekitError, match="from its golden value"):
            check_golden(session, bundle)


def test_few_models_are_compiled_and_the_oldest_make_room(monkeypatch):
    compiled = []
    real = Session._compile
    monkeypatch.setattr(
        Session, "_compile", lambda self, rows: compiled.append(len(rows["light_curve"])) or real(self, rows)
    )
    bundle = MODELS["plain"]
    session = Session(bundle, threads=1)
    for rows in range(1, 50):
        session.warmup(rows)
    assert sorted(compiled) == [1, 2, 4, 8, 16], "powers of two, whatever the batch"
    compiled.clear()
    given = Session(bundle, threads=1, chunk=64)
    for rows in (64, *range(1, module.SIZES + 1), 1, 64):
        given.warmup(rows)
        assert len(given._compiled) <= module.SIZES
    assert compiled == [64, *range(1, module.SIZES + 1), 64], "1 was used again and is still there; 64 had to go"


def test_several_threads_share_a_session():
    bundle = MODELS["context"]
    session = Session(bundle, threads=2, chunk=3)
    rows = golden_inputs(bundle.manifest.inputs, 400)
    expected = exact(bundle, rows)

    def work(start):
        part = slice(start, start + 40)
        got = session.run({name: array[part] for name, array in rows.items()})["probabilities"]
        return np.abs(got - expected[part]).max() < 2e-6

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, [*range(0, 400, 40)] * 5))


def test_sessions_say_what_they_are():
    session = Session(MODELS["plain"], threads=1)
    assert (session.provider, session.device) == ("openvino CPU f32", "cpu (1 thread)")
    for name in ("threads", "chunk"):
        with pytest.raises(EdgekitError, match=f"{name} = 0; expected at least 1"):
            Session(MODELS["plain"], **{name: 0})
    open_session(MODELS["plain"], "openvino", threads=1, chunk=4).warmup(3)


def test_what_is_not_there_is_refused_with_what_is():
    with pytest.raises(EdgekitError, match=r"no device 'GPU.7' here; it has .*CPU"):
        Session(MODELS["plain"], device="GPU.7")
    with pytest.raises(EdgekitError, match="unknown precision 'int8' in openvino; expected one of: f32, bf16, f16"):
        Session(MODELS["plain"], precision="int8")


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_a_precision_is_the_one_asked_for_or_refused(precision):
    bundle = MODELS["plain"]
    inputs, expected = bundle.golden()
    able = module.openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if module.PRECISIONS[precision] not in able:
        with pytest.raises(EdgekitError, match=f"CPU cannot compute in {precision}, .* it can do f32"):
            Session(bundle, precision=precision)
        return
    session = Session(bundle, threads=1, precision=precision)
    off = np.abs(session.run(inputs)["probabilities"] - expected["probabilities"]).max()
    assert session.provider.endswith(precision)
    assert 1e-5 < off < 0.05, "computed in float32, whatever the name"


def test_a_precision_that_openvino_changes_is_an_error(monkeypatch):
    """OpenVINO changes f16 on a CPU that has only bf16; only the compiled model shows it."""
    real = module.openvino.Core.compile_model

    def another(core, model, device, options):
        return real(core, model, device, {**options, "INFERENCE_PRECISION_HINT": "f32"})

    monkeypatch.setattr(module.openvino.Core, "compile_model", another)
    monkeypatch.setattr(module, "PRECISIONS", {"f32": "FP32", "bf16": "FP32"})
    with pytest.raises(EdgekitError, match="was asked for bf16 on CPU and would compute in f32"):
        Session(MODELS["plain"], precision="bf16").warmup(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {}, "'light_curve' is missing"),
        (lambda a: a | {"extra": a["context"]}, "unknown input 'extra'"),
        (lambda a: a | {"light_curve": a["light_curve"][:, :5]}, r"shape \(6, 5, 2\); expected \(batch, 12, 2\)"),
        (lambda a: a | {"light_curve": a["light_curve"] * np.float32("nan")}, "NaN"),
        (lambda a: a | {"context": a["context"][:3]}, "differ in batch size"),
    ],
)
def test_wrong_inputs_are_named(change, message):
    with pytest.raises(EdgekitError, match=message):
        Session(MODELS["context"]).run(change(MODELS["context"].golden()[0]))


def test_an_exported_model_runs_without_torch_and_only_for_its_own_bundle(tmp_path):
    bundle = MODELS["palette"]
    OpenVinoExporter().export(bundle, tmp_path / "out")
    with pytest.raises(EdgekitError, match="not an export of toy as it is now"):
        Session(MODELS["plain"], source=tmp_path / "out" / MODEL)
    with pytest.raises(EdgekitError, match=r"no such model, or no nowhere.bin in its folder"):
        Session(bundle, source=tmp_path / "nowhere.xml")
    write_bundle(bundle, tmp_path / "toy.edge")
    program = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from edgekit.bundle.store import open_bundle
from edgekit.session import open_session
from runtimes.sessions.c_session import check_golden
bundle = open_bundle(sys.argv[1])
check_golden(open_session(bundle, "openvino", source=sys.argv[2]), bundle)
"""
    command = [sys.executable, "-c", program, tmp_path / "toy.edge", tmp_path / "out" / MODEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    damaged = tmp_path / "out" / MODEL
    damaged.write_text(damaged.read_text()[:200])
    with pytest.raises(EdgekitError, match=r"model.xml: openvino cannot read it"):
        Session(bundle, source=damaged)


def test_without_the_package_the_line_that_installs_it_is_named(tmp_path):
    program = """
import sys
sys.modules["openvino"] = None
from edgekit.cli import main
sys.argv = ["edgekit", *sys.argv[1:]]
main()
"""
    write_bundle(MODELS["plain"], tmp_path / "toy.edge")
    for command in (
        ["bench", tmp_path / "toy.edge", "--runtime", "openvino"],
        ["export", tmp_path / "toy.edge", "--to", "openvino", "-o", tmp_path / "out"],
    ):
        done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "needs openvino, which is not installed; run: pip install 'edgekit[openvino]'" in done.stderr
        assert "Traceback" not in done.stderr
