"""The Open Inference Protocol, by Triton's client and by hand; dynamic batching."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from runtimes.daemon.batching import BatchLoop, can_share
from runtimes.daemon.refusal import RefusedError
from runtimes.daemon.stats import Stats
from runtimes.daemon.tensors import read

URL = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def rows(tiny_data):
    return tiny_data[1].inputs["light_curve"]


@pytest.fixture(scope="module")
def expected(tiny_bundle, rows):
    from edgekit.session import open_session

    return open_session(tiny_bundle, "torch").run({"light_curve": rows})["probabilities"]


@pytest.fixture(scope="module")
def triton(running):
    client = pytest.importorskip("tritonclient.http", reason="pip install 'tritonclient[http]'")
    found = client.InferenceServerClient(running.url.removeprefix("http://"))
    yield client, found
    found.close()


def asked(array, **change):
    return {
        "inputs": [
            {
                "name": "light_curve",
                "datatype": "FP32",
                "shape": list(array.shape),
                "data": array.reshape(-1).tolist(),
                **change,
            }
        ]
    }


def test_the_server_and_its_models_are_described(running, triton):
    _, client = triton
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert not client.is_model_ready("none")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    found = client.get_model_metadata("tiny")
    assert found["inputs"] == [{"name": "light_curve", "datatype": "FP32", "shape": [-1, 12, 2]}]
    assert found["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}]
    assert client.get_model_metadata("tiny", "1") == found
    assert running.get("/v2/models/tiny/versions/2").refused(404, "version '2'")


@pytest.mark.parametrize("sent", [True, False], ids=["bytes", "JSON"])
@pytest.mark.parametrize("wanted", [True, False], ids=["bytes", "JSON"])
def test_triton_gets_what_the_session_gives(triton, rows, expected, sent, wanted):
    module, client = triton
    tensor = module.InferInput("light_curve", [5, 12, 2], "FP32").set_data_from_numpy(rows[:5], binary_data=sent)
    outputs = [module.InferRequestedOutput("probabilities", binary_data=wanted)]
    for given in (outputs, None):
        answer = client.infer("tiny", [tensor], outputs=given, request_id="7", timeout=60_000_000)
        assert answer.get_response()["id"] == "7"
        assert np.allclose(answer.as_numpy("probabilities"), expected[:5], atol=1e-6)


def test_concurrent_requests_share_runs_and_get_the_answers_of_single_ones(running, rows, expected):
    running.get("/v2/models/tiny")
    before = running.daemon.stats.snapshot(["tiny"])[0]["tiny"].rows.count

    def ask(number):
        answer = running.post(URL, asked(rows[number : number + 1 + number % 3]))
        return np.array(answer.json["outputs"][0]["data"]).reshape(answer.json["outputs"][0]["shape"])

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, range(64)))
    for number, output in enumerate(found):
        assert np.allclose(output, expected[number : number + 1 + number % 3], atol=1e-6)
    runs = running.daemon.stats.snapshot(["tiny"])[0]["tiny"].rows.count - before
    assert runs < 64 / 2
    assert not np.allclose(found[0], expected[1], atol=1e-3)  # the twin: rows of another request would be seen


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "curve"}, "unknown input 'curve'"),
        ({"datatype": "FP64"}, "dtype float64"),
        ({"datatype": "BYTES"}, "one of: BOOL"),
        ({"shape": [1, 12, 3]}, "has shape [24]"),
        ({"shape": [1, 24]}, "shape (1, 24)"),
        ({"shape": []}, "shape"),
        ({"shape": [-1, 12, 2]}, "shape"),
        ({"shape": [2**39, 2**39, 2]}, "data has shape"),
        ({"shape": [True, 12, 2]}, "shape"),
        ({"shape": [0, 12, 2], "data": []}, "no rows"),
        ({"data": "abc"}, "expected an array"),
        ({"data": ["a"] * 24}, "other values than numbers"),
        ({"data": [[1, 2], [3]]}, "ragged"),
        ({"data": [None] * 24}, "other values than numbers"),
        ({"data": [1e300] * 24}, "too large for FP32"),
        ({"data": [10**400] * 24}, "other values than numbers"),
        ({"data": None}, "expected data, or parameters.binary_data_size"),
        ({"parameters": {"binary_data_size": 4}}, "and not both"),
        ({"parameters": {"shared_memory_region": "x"}}, "shared_memory_region"),
        ({"extra": 1}, "unknown field 'extra'"),
    ],
)
def test_a_wrong_input_is_named(running, rows, change, words):
    assert running.post(URL, asked(rows[:1], **change)).refused(400, words)


def test_a_wrong_request_is_named(running, rows):
    good = asked(rows[:1])
    assert running.post(URL, {**good, "outputs": [{"name": "x"}]}).refused(400, "unknown output 'x'")
    assert running.post(URL, {**good, "outputs": [3]}).refused(400, "outputs[0].name is missing")
    assert running.post(URL, {"inputs": good["inputs"] * 2}).refused(400, "given twice")
    assert running.post(URL, {"inputs": []}).refused(400, "'light_curve' is missing")
    assert running.post(URL, {"inputs": [3]}).refused(400, "inputs[0].name is missing")
    assert running.post(URL, {**good, "parameters": {"sequence_id": 5}}).refused(400, "sequence_id is not supported")
    assert running.post("/v2/models/toy/infer", good).refused(400, "/v1/chat/completions")
    assert running.post("/v2/models/none/infer", good).refused(404, "unknown model")
    assert running.post(URL, b"x").refused(400, "not valid JSON")
    header = {"Inference-Header-Content-Length": "99999"}
    assert running.post(URL, good, headers=header).refused(400, "Inference-Header-Content-Length")
    header = {"Inference-Header-Content-Length": "-1"}
    assert running.post(URL, good, headers=header).refused(400, "Inference-Header-Content-Length")


def binary(size, content, shape=(1, 12, 2), datatype="FP32"):
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    return read(head + content, str(len(head)))


def test_bytes_must_be_those_of_the_shape():
    assert binary(96, bytes(96)).arrays["x"].shape == (1, 12, 2)
    for size, content in ((95, bytes(95)), (96, bytes(95)), (96, bytes(97)), (-96, bytes(96)), (0, b"")):
        with pytest.raises(RefusedError, match="bytes"):
            binary(size, content)
    assert binary(3, b"\0\1\0", (3,), "BOOL").arrays["x"].tolist() == [False, True, False]
    with pytest.raises(RefusedError, match="0 and 1"):
        binary(1, b"\2", (1,), "BOOL")


def test_numbers_keep_their_range():
    def one(data, datatype):
        tensor = {"name": "x", "datatype": datatype, "shape": [len(data)], "data": data}
        return read(json.dumps({"inputs": [tensor]}).encode(), None).arrays["x"]

    assert one([2**63], "UINT64").tolist() == [2**63]
    assert one([-128, 127], "INT8").tolist() == [-128, 127]
    for data, datatype in (([128], "INT8"), ([-1], "UINT64"), ([1.5], "INT32"), ([True], "FP32"), ([1], "BOOL")):
        with pytest.raises(RefusedError, match="holds"):
            one(data, datatype)


def test_an_answer_that_is_no_number_is_an_error_in_json_and_comes_as_bytes(start, register, model_files):
    class Overflows:
        device = provider = "fake"

        def __init__(self, bundle, *, threads=None, chunk=None):
            self.inputs, self.outputs = bundle.manifest.inputs, bundle.manifest.outputs

        def run(self, arrays):
            return {"probabilities": np.full((len(arrays["light_curve"]), 3), np.inf, np.float32)}

        def warmup(self, batch):
            pass

    from runtimes.daemon.config import ModelSettings

    register("edgekit.sessions", "overflows", Overflows)
    models = {"over": ModelSettings(path=str(model_files[1]), runtime="overflows")}
    with start(models=models) as running:
        given = asked(np.zeros((1, 12, 2), np.float32))
        assert running.post("/v2/models/over/infer", given).refused(400, "NaN or infinite", "ask for bytes")
        answer = running.post("/v2/models/over/infer", {**given, "parameters": {"binary_data_output": True}})
        assert (
            answer.content[int(answer.headers["inference-header-content-length"]) :]
            == np.full(3, np.inf, "f4").tobytes()
        )


# --- batching


class Session:
    """Doubles x. A value of 13 is refused, in which batch it ever is."""

    inputs = (TensorSpec("x", ("batch", "width")),)
    outputs = (TensorSpec("y", ("batch", "width")),)

    def __init__(self):
        self.batches, self.hold = [], threading.Event()
        self.hold.set()

    def run(self, arrays):
        self.hold.wait(10)
        self.batches.append(len(arrays["x"]))
        if (arrays["x"] == 13).any():
            raise EdgekitError("13 is not computed")
        return {"y": 2 * arrays["x"]}


@pytest.fixture
def batching():
    loops = []

    def make(**options):
        session = Session()
        found = BatchLoop("x", session, **{"batch": 4, "seconds": 0.05, "most": 100, "stats": Stats(), **options})
        loops.append(found)
        return found, session

    yield make
    for item in loops:
        item.session.hold.set()
        item.close()


def ask(loop, value, *, width=2, rows=1, seconds=10.0):
    return loop.submit({"x": np.full((rows, width), value, np.float32)}, time.monotonic() + seconds)


def test_a_full_batch_does_not_wait(batching):
    loop, session = batching(seconds=60.0)
    found = [ask(loop, value) for value in range(4)]
    assert [item.result(5)["y"].tolist() for item in found] == [[[2.0 * value] * 2] for value in range(4)]
    assert session.batches == [4]


def test_only_rows_of_one_shape_share_a_run(batching):
    loop, session = batching()
    found = [ask(loop, 1, width=width) for width in (2, 3, 2)]
    assert [item.result(5)["y"].shape for item in found] == [(1, 2), (1, 3), (1, 2)]
    assert sorted(session.batches) == [1, 2]


def test_one_bad_request_fails_alone(batching):
    loop, session = batching()
    found = [ask(loop, value) for value in (1, 13, 3)]
    assert found[0].result(5)["y"][0, 0] == 2
    assert found[2].result(5)["y"][0, 0] == 6
    with pytest.raises(RefusedError, match="13 is not computed"):
        found[1].result(5)
    assert session.batches == [3, 1, 1, 1]


def test_a_near_deadline_does_not_wait_for_others(batching):
    loop, session = batching(seconds=5.0)
    started = time.monotonic()
    first, second = ask(loop, 1), ask(loop, 2, seconds=1.0)
    assert second.result(5)["y"][0, 0] == 4
    assert first.result(5)["y"][0, 0] == 2
    assert 0.5 < time.monotonic() - started < 3
    assert session.batches == [2]


def test_a_request_past_its_deadline_and_one_that_was_cancelled_do_not_run(batching):
    loop, session = batching(seconds=0.0)
    session.hold.clear()
    first = ask(loop, 1)
    while not first.running():
        time.sleep(0.01)
    late, gone = ask(loop, 2, seconds=0.01), ask(loop, 3)
    assert gone.cancel()
    time.sleep(0.05)
    session.hold.set()
    assert first.result(5)["y"][0, 0] == 2
    with pytest.raises(RefusedError, match="deadline") as found:
        late.result(5)
    assert found.value.status == 504
    assert ask(loop, 4).result(5)["y"][0, 0] == 8
    assert session.batches == [1, 1]


def test_a_full_queue_is_refused(batching):
    loop, session = batching(most=2, seconds=0.0)
    session.hold.clear()
    kept = [ask(loop, 1), ask(loop, 2)]
    with pytest.raises(RefusedError, match=r"limits.queue is 2") as found:
        ask(loop, 3)
    assert (found.value.status, found.value.retry_after) == (503, 1)
    session.hold.set()
    assert [item.result(5)["y"][0, 0] for item in kept] == [2, 4]


def test_a_request_of_more_rows_than_a_batch_runs_whole(batching):
    loop, _ = batching()
    assert ask(loop, 1, rows=9).result(5)["y"].shape == (9, 2)


def test_which_models_can_share_a_run():
    free, fixed = TensorSpec("a", ("batch", 2)), TensorSpec("b", (1, 2))
    assert can_share([free], [free])
    assert not can_share([free, fixed], [free])
    assert not can_share([fixed], [fixed])
    assert not can_share([free], [TensorSpec("c", ("other",))])
    assert not can_share([free], [TensorSpec("c", ())])
