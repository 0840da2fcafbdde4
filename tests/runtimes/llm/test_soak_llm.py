"""A short form of tools/soak_llm.py, and planted losses that it must see."""

from contextlib import closing

import pytest

from runtimes.llm.native_engine import NativeEngine
from tests.runtimes.llm.conftest import compiler
from tools.soak_llm import Soak, faults


def soaked(model, kv="f16", **options):
    with closing(NativeEngine(model, blocks=24, kv=kv, threads=1)) as engine:
        soak = Soak(engine, rate=20_000.0, longest=60, **options)
        soak.run(0.5)
        return soak, faults(soak, [100.0] * 8)


@compiler
@pytest.mark.parametrize("kv", ["f16", "int4"])
def test_random_requests_lose_nothing(toy, kv):
    soak, found = soaked(toy(), kv)
    assert found == []
    assert soak.submitted > 100
    assert soak.ends["cancelled"] > 0
    assert soak.scheduler.preempted > 0
    assert soak.ends["length"] > 50
    assert soak.tokens > soak.ends["length"]


@compiler
def test_lost_blocks_and_lost_requests_are_seen(toy, monkeypatch):
    """Planted: an engine that keeps the blocks of one sequence in eight, and an answer whose end nobody is told."""
    remove = NativeEngine.remove

    def forgetful(self, sequence):
        if sequence % 8:
            remove(self, sequence)

    with monkeypatch.context() as patch:
        patch.setattr(NativeEngine, "remove", forgetful)
        with closing(NativeEngine(toy(), blocks=400, threads=1)) as engine:
            soak = Soak(engine, rate=1000.0, longest=60)
            soak.run(0.5)
            assert any("blocks are in use" in item for item in faults(soak, [100.0] * 8))
    soak, _ = soaked(toy())
    soak.ends["length"] -= 1
    assert any("have ended" in item for item in faults(soak, [100.0] * 8))


@compiler
def test_growing_memory_is_seen(toy):
    with closing(NativeEngine(toy(), blocks=8, threads=1)) as engine:
        soak = Soak(engine, rate=60.0, longest=60)
        assert faults(soak, [100.0, 101.0, 100.0, 101.0, 101.0, 102.0, 101.0, 102.0]) == []
        assert faults(soak, [100.0 + 3 * number for number in range(16)]) == ["the memory has grown from 116 to 140 MB"]
