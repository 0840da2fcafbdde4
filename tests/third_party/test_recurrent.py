"""The six graphs of silero-vad: import, int8, exports, and a sequence in chunks beside the whole."""

import subprocess
import sys
from functools import cache

import numpy as np
import onnxruntime
import pytest

import edgekit
from edgekit.compression.quick import quantize
from edgekit.errors import EdgekitError
from edgekit.exporter import export
from edgekit.graph.lower import lower
from edgekit.session import open_session
from exporters.damage import sensitivity
from exporters.verify import on_onnxruntime, verify
from tests.exporters.test_damage import with_half_of
from tests.third_party.conftest import STATES, third_party_file

pytestmark = pytest.mark.models
WINDOW, WINDOWS = 576, 40
TOLERANCE = 1e-6  # of a probability


@cache
def imported(name):
    return edgekit.import_onnx(third_party_file(name), name=name, **STATES[name])


def speech_like():
    """Tones that come and go, at 16 kHz: (1, samples)."""
    time = np.arange(WINDOW * WINDOWS) / 16_000
    pitch = 220 * (1 + 0.3 * np.sin(2 * np.pi * 3 * time))
    return (0.3 * np.sin(2 * np.pi * pitch * time) * (np.sin(3 * np.pi * time) > 0)).astype(np.float32)[None]


def by_hand(name):
    """The probabilities of the original file, call by call, by a loop over onnxruntime."""
    session = onnxruntime.InferenceSession(str(third_party_file(name)), providers=["CPUExecutionProvider"])
    takes = {value.name for value in session.get_inputs()}
    state, found = np.zeros((2, 1, 128), np.float32), []
    for number in range(WINDOWS):
        fed = {"input": speech_like()[:, number * WINDOW : (number + 1) * WINDOW], "state": state}
        output, state = session.run(None, fed | ({"sr": np.array(16000, np.int64)} if "sr" in takes else {}))
        found.append(float(output[0, 0]))
    return np.array(found)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", [name for name in STATES if name != "silero-sequence"])
def test_a_stream_gives_what_the_original_file_gives(name, runtime):
    found = edgekit.Session(imported(name), runtime, threads=1).run_stream({"input": speech_like()})
    tolerance = TOLERANCE if runtime == "onnxruntime" else 1e-4
    assert np.abs(found["output"][0, :, 0] - by_hand(name)).max() < tolerance


@pytest.mark.parametrize("chunk", [1, 7, WINDOWS])
def test_a_sequence_in_chunks_equals_the_whole_and_the_other_variants(chunk):
    session = edgekit.Session(imported("silero-sequence"), "onnxruntime", threads=1)
    windows = speech_like().reshape(1, WINDOWS, WINDOW)
    state = {name: np.zeros((1, 1, 1, 128), np.float32) for name in ("h", "c")}
    whole = session.run({"input": windows, **state})["speech_probs"]
    found = session.run_stream({"input": windows}, chunk=chunk)["speech_probs"]
    assert np.abs(found - whole).max() < TOLERANCE
    assert np.abs(found[0] - by_hand("silero-openvino")).max() < TOLERANCE
    assert whole.max() - whole.min() > 0.01


@pytest.mark.parametrize("name", STATES)
def test_every_damage_is_found(name):
    bundle = imported(name)
    found = sensitivity(lower(bundle), bundle, 1e-3)
    assert found.tried >= 7
    assert (found.found, found.blind) == (found.tried, ())
    copy = with_half_of(lower(bundle), 25)
    with pytest.raises(EdgekitError, match="its outputs differ from the source network's by"):
        verify({"model.onnx": copy.SerializeToString()}, bundle, batches=(1, 2), load=on_onnxruntime)


@pytest.mark.parametrize("to", ["onnx", "openvino", "jetson-orin-nano-8gb", "tesla-p40", "jetson-nano"])
@pytest.mark.parametrize("name", STATES)
def test_every_variant_is_exported_and_checks_itself(name, to, tmp_path):
    form = to if to in ("onnx", "openvino") else "tensorrt"
    options = {} if form == to else {"target": to}
    if form == "tensorrt" and name == "silero-sequence":
        options["axes"] = ("sequence_length=1:64:256",)
    export(imported(name), tmp_path / "x", to=form, options=options)
    command = [sys.executable, tmp_path / "x" / "verify.py", *(["--runtime", "onnxruntime"] if form != to else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "PASS"), done.stdout + done.stderr


@pytest.mark.parametrize("name", STATES)
def test_static_int8_is_smaller_and_dynamic_int8_is_refused_with_its_cosine(name, tmp_path):
    """Quantizing the Fourier basis of a waveform by the range of the call loses the quiet bins."""
    bundle = imported(name)
    result = quantize(bundle, "int8", bundle.golden()[0])
    assert result.bytes[0] > 1.6 * result.bytes[1]
    assert result.cosine > 0.99
    assert result.bundle.manifest.state == bundle.manifest.state
    rows, _ = bundle.golden()
    assert open_session(result.bundle, "onnxruntime", threads=1).run(rows).keys() == bundle.golden()[1].keys()
    export(result.bundle, tmp_path / "x", to="onnx")
    with pytest.raises(EdgekitError, match=r"the cosine of outputs with the original's is -?0\.\d+"):
        quantize(bundle, "int8")
