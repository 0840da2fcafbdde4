"""Weights under a budget of memory: the same bits as with all weights in memory, and no more memory than was said."""

import json
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.engine import Item
from runtimes.llm.model import load
from runtimes.llm.native_engine import MATRICES, NativeEngine
from runtimes.llm.streaming import LayerStream, kept_layers, release_pages
from tests.gguf_files import toy_model
from tests.runtimes.llm.conftest import compiler
from tests.runtimes.llm.test_engines import IDS, check_schedules, run

SIZES = {"layers": 6}


def smallest(model):
    """The least budget that the error names."""
    with pytest.raises(EdgekitError, match="this model needs at least") as caught:
        NativeEngine(model, weights_memory=1)
    return int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))


@compiler
@pytest.mark.parametrize("form", ["Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("kv", ["f16", "int4"])
def test_logits_are_the_same_bits_as_with_all_weights_in_memory(toy, form, kv):
    model = toy("llama", form, **SIZES)
    least = smallest(model)
    with closing(NativeEngine(model, blocks=80, kv=kv, threads=2)) as engine:
        expected, whole, weights = run(engine), engine.bytes, engine._weights
    for memory in (least, (least + weights) // 2, 1 << 40):
        with closing(NativeEngine(model, blocks=80, kv=kv, threads=2, weights_memory=memory)) as engine:
            assert np.array_equal(check_schedules(engine, np.array_equal), expected)
            assert (engine.bytes < whole) is (memory < 1 << 40)


@compiler
def test_formats_that_the_engine_does_not_have_are_streamed_too(toy):
    model = toy("qwen2", "F32", **SIZES)
    with closing(NativeEngine(model, blocks=8, weights="q8_0")) as engine:
        expected = run(engine)
    with pytest.raises(EdgekitError, match="this model needs at least") as caught:
        NativeEngine(model, weights="q8_0", weights_memory=1)
    least = int(str(caught.value).split("at least ")[1].split(":")[0].replace(",", ""))
    with closing(NativeEngine(model, blocks=8, weights="q8_0", weights_memory=least)) as engine:
        assert np.array_equal(run(engine), expected)


@compiler
def test_a_stream_that_brings_the_wrong_layer_is_seen(toy, monkeypatch):
    model = toy("llama", "Q8_0", **SIZES)
    with closing(NativeEngine(model, blocks=8)) as engine:
        expected = run(engine)

    def wrong(self, number, buffer):
        self._library.engine_place(self._engine, self._resident + buffer * self._buffer)
        for role, name in enumerate(MATRICES):
            self._matrix(number, role, getattr(model.layers[5 if number == 4 else number], name))

    monkeypatch.setattr(NativeEngine, "_load_streamed", wrong)
    with closing(NativeEngine(model, blocks=8, weights_memory=smallest(model))) as engine:
        assert not np.array_equal(run(engine), expected)


def test_layers_stay_in_memory_as_far_as_the_budget_goes():
    sizes = [10, 10, 10, 30, 10]
    assert kept_layers(1000, 5, sizes) == 5
    assert kept_layers(75, 5, sizes) == 5
    assert kept_layers(74, 5, sizes) == 0
    assert kept_layers(65, 5, sizes) == 0
    assert kept_layers(94, 5, [10] * 100) == 6
    with pytest.raises(EdgekitError, match="weights_memory = 64 bytes; this model needs at least 65: 5 for"):
        kept_layers(64, 5, sizes)


class Loads:
    """Notes which layer was read into which buffer, and lets the test hold the reading."""

    def __init__(self):
        self.done, self.open = [], threading.Event()
        self.open.set()

    def __call__(self, number, buffer):
        assert self.open.wait(10)
        self.done.append((number, buffer))


def test_the_next_layer_is_read_while_one_is_computed():
    loads = Loads()
    stream = LayerStream([2, 3, 4], loads)
    stream.ready(0)  # it stays in memory
    assert loads.done == []
    stream.ready(2)
    stream.ready(3)
    stream._wait()
    loads.open.clear()
    stream.ready(4)  # which was read ahead; its successor waits
    assert [number for number, _ in loads.done] == [2, 3, 4]
    loads.open.set()
    stream.ready(2)
    stream.close()
    assert loads.done[3] == (2, 1 - dict(loads.done[:3])[4])
    assert all(one[1] != two[1] for one, two in zip(loads.done, loads.done[1:], strict=False))


def test_a_step_that_begins_again_reads_its_first_layer_again():
    loads = Loads()
    stream = LayerStream([0, 1, 2, 3], loads)
    for number in (0, 1, 0, 1, 2, 3, 0):
        stream.ready(number)
        stream._wait()
        assert number in stream._buffers
    stream.close()


def test_a_layer_that_cannot_be_read_is_an_error_each_time():
    def fail(number, buffer):
        if number == 1:
            raise OSError("gone")

    stream = LayerStream([0, 1], fail)
    stream.ready(0)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            stream.ready(1)
    stream.close()


def test_pages_are_given_back_of_mapped_files_alone(tmp_path):
    import mmap

    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    with path.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    mapped = np.frombuffer(mapping, np.uint8)[100:9000]
    own = np.arange(9000, dtype=np.uint16).view(np.uint8)
    for content in (mapped, own):
        before = content.copy()
        release_pages(content)
        assert np.array_equal(content, before)


CHILD = """
import json, sys
import numpy as np
from pathlib import Path
from edgekit.importers.gguf import read_gguf
from runtimes.llm.architecture import from_gguf
from runtimes.llm.engine import Item
from runtimes.llm.native_engine import NativeEngine

def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

model = from_gguf(read_gguf(Path(sys.argv[1])))
memory = None if sys.argv[2] == "all" else sys.argv[2]
before = status("VmRSS")
engine = NativeEngine(model, blocks=8, threads=2, rows=16, weights_memory=memory)
ids = np.arange(100)
for at in range(0, 100, 10):
    logits = engine.step([Item(0, ids[at : at + 10])])[0]
print(json.dumps({"used": status("VmHWM") - before, "logits": logits[0].tolist(), "bytes": engine.bytes}))
"""
OVERHEAD = 16 << 20  # bytes beside weights: the cache, activations, threads, what is decoded, and the interpreter


@compiler
def test_a_process_takes_no_more_memory_than_the_budget(tmp_path):
    sizes = {"layers": 10, "width": 512, "hidden": 1536, "heads": 8, "kv_heads": 8, "head_size": 64}
    path = toy_model(tmp_path, "llama", "F16", **sizes)
    found = {}
    for memory in ("all", "32MB"):
        command = [sys.executable, "-c", CHILD, str(path), memory]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        found[memory] = json.loads(done.stdout)
    assert found["all"]["logits"] == found["32MB"]["logits"]
    assert found["32MB"]["used"] < 32_000_000 + OVERHEAD
    assert found["all"]["used"] > 32_000_000 + OVERHEAD  # the measure sees weights that are in memory


@compiler
def test_budgets_are_sizes(toy, tmp_path, edgekit):
    path = toy_model(tmp_path, "llama", "Q8_0")
    with load(path, weights_memory="1GB", context=64) as model:
        expected = "".join(model.complete("in the", most_tokens=5))
    with pytest.raises(EdgekitError, match="weights_memory 'much': expected a size such as 20GB"):
        load(path, weights_memory="much")
    common = ["llm", "complete", str(path), "in the", "--max-tokens", "5", "--context", "64"]
    done = edgekit(*common, "--weights-memory", "1GB")
    assert done.out.strip() == expected.strip()
    refused = edgekit(*common, "--weights-memory", "1KB")
    assert refused.status == 1
    assert "this model needs at least" in refused.err


@compiler
def test_embeddings_and_given_up_steps_are_streamed(toy):
    model = toy("llama", "F32", **SIZES)
    rows = model.embedding.values()[IDS]
    with closing(NativeEngine(model, blocks=32, weights_memory=smallest(model))) as engine:
        expected = run(engine)
        engine.start([Item(1, IDS[:20])]).advance(3)
        assert np.array_equal(run(engine, rows, 2), expected)
