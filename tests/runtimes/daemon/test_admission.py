import os
import subprocess
import sys

import pytest

from runtimes.daemon.admission import Admission, Needs, of_bundle, of_language
from runtimes.llm.model import load
from tests.runtimes.llm.conftest import compiler

MB = 1_000_000


def machine(total, free):
    return lambda: (total * MB, free * MB)


def test_the_sum_is_in_the_refusal():
    needs = Needs(100 * MB, 50 * MB, 30 * MB)
    refused = Admission(memory=machine(1000, 120)).refusal("chat", needs, 0)
    assert "100 MB of weights + 50 MB of cache + 30 MB of workspace = 180 MB" in str(refused)
    assert "120 MB are free" in str(refused)
    assert (refused.status, refused.retry_after) == (507, None)


@pytest.mark.parametrize(
    ("limit", "free", "taken", "missing"),
    [("", 200, 0, 0), ("", 150, 0, 30), ("200MB", 999, 0, 0), ("200MB", 999, 50, 30), ("200MB", 100, 50, 80)],
)
def test_what_is_missing(limit, free, taken, missing):
    admission = Admission(limit, machine(1000, free))
    assert admission.missing(Needs(100 * MB, 50 * MB, 30 * MB), taken * MB) == missing * MB


def test_a_model_that_fits_once_others_have_ended_may_be_asked_for_again():
    needs = Needs(100 * MB, 0, 0)
    refused = Admission("150MB", machine(1000, 900)).refusal("chat", needs, 80 * MB)
    assert (refused.status, refused.retry_after) == (503, 10)
    assert "70 MB are left of server.memory" in str(refused)
    assert Admission("90MB", machine(1000, 900)).refusal("chat", needs, 80 * MB).status == 507


def test_a_system_that_tells_no_memory_refuses_nothing():
    assert Admission(memory=lambda: (0, 0)).missing(Needs(1 << 60, 0, 0), 0) == 0


def test_the_cache_is_in_proportion_to_the_context(toy_source):
    def needs(context, kv):
        options = {"engine": "native", "rows": 512, "folder": False}
        return of_language(toy_source.model, kv=kv, context=context, **options)

    assert needs(1000, "f16").cache == pytest.approx(needs(500, "f16").cache * 2, rel=1e-3)
    assert needs(1000, "int4").cache < needs(1000, "int8").cache < needs(1000, "").cache
    assert of_language(toy_source.model, engine="torch", kv="", context=1000, rows=1, folder=False).cache == (
        pytest.approx(2 * needs(1000, "f16").cache, rel=1e-3)
    )


@pytest.fixture
def toy_source(model_files):
    from runtimes.llm.source import open_source

    return open_source(model_files[0])


@compiler
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_the_native_engine_takes_no_more_than_the_sum(toy_source, model_files, kv):
    """The engine counts its own weights and cache."""
    needs = of_language(toy_source.model, engine="native", kv=kv, context=4096 // 2, rows=512, folder=False)
    with load(model_files[0], kv=kv, context=2048) as model:
        assert model.engine.bytes <= needs.weights + needs.cache <= 1.6 * model.engine.bytes


MEASURED = """
import sys
from edgekit.machine import memory_bytes
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
from runtimes.llm.model import load
from runtimes.llm.engine import Item
import numpy as np
import tokenizers, jinja2
before = resident()
model = load("smollm2", context=int(sys.argv[1]))
for sequence in range(int(sys.argv[1]) // 512):
    model.engine.step([Item(sequence, np.arange(512), logits="all")])
print(resident() - before)
"""


@pytest.mark.models
@compiler
def test_the_sum_for_a_real_model_is_near_what_a_process_takes(smollm2_file):
    from runtimes.llm.source import open_source

    needs = of_language(
        open_source(smollm2_file).model, engine="native", kv="f16", context=8192, rows=512, folder=False
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "8192"], capture_output=True, text=True, check=True, env=environment
    )
    taken = int(done.stdout) - smollm2_file.stat().st_size  # the file is mapped, and the system can drop it
    assert 0.5 * needs.total < taken < needs.total, (taken, str(needs))


def test_a_bundle_needs_its_weights_twice(tiny_bundle):
    weights = sum(value.nbytes for value in tiny_bundle.weights().values())
    needs = of_bundle(tiny_bundle, 32)
    assert 2 * weights <= needs.weights < 3 * weights
    assert of_bundle(tiny_bundle, 320).workspace > needs.workspace
