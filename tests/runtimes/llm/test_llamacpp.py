"""llama.cpp as an engine: against the reference, under other schedules, and what it refuses."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm import llamacpp_library
from runtimes.llm.blocks import NoBlocksError
from runtimes.llm.engine import Item
from runtimes.llm.llamacpp_engine import LlamaCppEngine
from runtimes.llm.llamacpp_library import CONTEXT, FLAGS, MODEL, layout_of
from runtimes.llm.torch_engine import TorchEngine
from tests.gguf_files import toy_model

IDS = np.random.default_rng(7).integers(0, 300, 90)
EXACT = 3e-3  # of the largest logit: float32 weights, and a cache in float16
AWAY = 0.06  # the same with weights and activations of 8 bits and fewer


def installed():
    try:
        return bool(llamacpp_library.find())
    except EdgekitError:
        return False


library = pytest.mark.skipif(not installed(), reason="no llama.cpp here: pip install 'edgekit[llamacpp]'")


def logits(engine, ids=IDS, sequence=0, **options):
    return engine.step([Item(sequence, ids, logits="all", **options)])[0]


def away(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.fixture
def engine(toy):
    with closing(LlamaCppEngine(toy("llama", "F32"), blocks=64, threads=1)) as found:
        yield found


@pytest.fixture
def expected(toy):
    return logits(TorchEngine(toy("llama", "F32"), blocks=16, dtype="float64"))


@library
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("form", "most"), [("F32", EXACT), ("Q8_0", AWAY), ("Q4_0", AWAY)])
def test_it_is_near_the_reference(toy, family, form, most):
    model = toy(family, form, head_size=16)  # llama.cpp's Qwen2 has heads of width / heads dimensions alone
    reference = logits(TorchEngine(model, blocks=8, dtype="float64"))
    with closing(LlamaCppEngine(model, blocks=8, threads=2)) as engine:
        found = logits(engine)
    assert away(found, reference) < most
    assert away(found[1:], reference[:-1]) > 5 * most  # another token's are far


@library
@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_a_cache_of_fewer_bits_is_another_cache(toy, kv, expected):
    with closing(LlamaCppEngine(toy("llama", "F32"), blocks=8, threads=1, kv=kv)) as engine:
        found = away(logits(engine), expected)
    assert EXACT < found < {"q8_0": 0.03, "q4_0": 0.5}[kv]


@library
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("flash_attention", [True, False])
def test_every_schedule_gives_the_same_to_rounding(toy, expected, shared, flash_attention):
    options = {"shared": shared, "flash_attention": flash_attention, "sequences": 8}
    with closing(LlamaCppEngine(toy("llama", "F32"), blocks=128, threads=1, **options)) as engine:
        for size in (1, 17):
            parts = [logits(engine, IDS[at : at + size], size) for at in range(0, 90, size)]
            assert away(np.concatenate(parts), expected) < EXACT
            engine.remove(size)
        # a ragged batch; a fork that is cut and goes on beside its parent; a sequence that is saved, and restored
        engine.step([Item(0, IDS[:40], logits="none"), Item(1, IDS[:33])])
        mixed = engine.step([Item(0, IDS[40:70], logits="all"), Item(1, IDS[33:34]), Item(2, IDS[:9])])
        for found, rows in zip(mixed, (slice(40, 70), slice(33, 34), slice(8, 9)), strict=True):
            assert away(found, expected[rows]) < EXACT
        engine.fork(0, 3)
        engine.truncate(3, 50)
        both = engine.step([Item(3, IDS[50:60], logits="all"), Item(0, IDS[70:71])])
        assert away(both[0], expected[50:60]) < EXACT
        assert away(both[1], expected[70:71]) < EXACT
        saved = engine.save(0)
        engine.remove(0)
        engine.restore(4, saved)
        assert away(logits(engine, IDS[71:], 4), expected[71:]) < EXACT
        # a sequence begun with what another one has, and one that is cut to nothing
        assert engine.reuse(5, IDS) == 89
        assert away(logits(engine, IDS[89:], 5), expected[89:]) < EXACT
        engine.truncate(5, 0)
        assert away(logits(engine, IDS[:20], 5), expected[:20]) < EXACT
        assert engine.reuse(6, IDS[::-1].copy()) == 0
        for sequence in list(engine.blocks.tables):
            engine.remove(sequence)
        assert engine.blocks.free == engine.blocks.number
        assert away(logits(engine), expected) < EXACT


@library
def test_embeddings_go_in_beside_tokens(toy, engine, expected):
    rows = toy("llama", "F32").embedding.values()[IDS]
    mixed = engine.step([Item(0, IDS, logits="all"), Item(1, rows, logits="all"), Item(2, IDS[:5])])
    assert away(mixed[0], expected) < EXACT
    assert away(mixed[1], expected) < EXACT
    assert away(mixed[2], expected[4:5]) < EXACT
    assert away(logits(engine, rows[::-1].copy(), 3), expected) > 10 * EXACT


@library
def test_a_cache_that_is_full_takes_no_step_and_keeps_what_it_has(toy, expected):
    with closing(LlamaCppEngine(toy("llama", "F32"), blocks=4, threads=1)) as engine:
        logits(engine, IDS[:50])
        with pytest.raises(NoBlocksError):
            logits(engine, IDS[50:])
        assert away(logits(engine, IDS[50:64]), expected[50:64]) < EXACT


@library
def test_what_llama_cpp_cannot_do_is_refused(engine, expected):
    with pytest.raises(EdgekitError, match=r"takes the positions 0 to 4 here and no others"):
        logits(engine, IDS[:5], positions=np.arange(5) * 2)
    assert away(logits(engine, IDS[:5], positions=np.arange(5)), expected[:5]) < EXACT
    with pytest.raises(EdgekitError, match="runs all layers of a step at once"):
        engine.step([Item(0, IDS[5:9])], between=print)
    assert engine.length(0) == 5
    assert away(logits(engine, IDS[5:9]), expected[5:9]) < EXACT
    with pytest.raises(EdgekitError, match="65 sequences at a time; this engine has 64"):
        engine.step([Item(number, IDS[:1]) for number in range(1, 65)])


@library
def test_options_that_do_not_fit_are_refused(toy, tmp_path):
    model = toy("llama", "F32")
    for options, problem in (
        ({"kv": "int8"}, "unknown format of llama.cpp's key-value cache 'int8'"),
        ({"threads": 0}, "threads = 0; expected 1 to 256"),
        ({"sequences": 257}, "sequences = 257; expected 1 to 256"),
        ({"gpu_layers": 3}, "gpu_layers = 3, and .* is a build for the CPU alone"),
        ({"library": tmp_path}, "no file, and no folder with a libllama.so"),
        ({"blocks": 1 << 26}, "bytes are needed"),
    ):
        with pytest.raises(EdgekitError, match=problem):
            LlamaCppEngine(model, **{"blocks": 8} | options)


@library
def test_a_state_of_another_model_or_cache_is_refused(toy, engine):
    logits(engine, IDS[:20])
    saved = engine.save(0)
    for other in (
        LlamaCppEngine(toy("llama", "F32"), blocks=8, threads=1, kv="q8_0"),
        LlamaCppEngine(toy("llama", "F32", layers=3), blocks=8, threads=1),
    ):
        with closing(other), pytest.raises(EdgekitError, match="restore it to an engine of the same model"):
            other.restore(0, saved)
    damaged = type(saved)(saved.inputs, saved.content[:, :100], saved.tail)
    with pytest.raises(EdgekitError, match="cannot restore a saved sequence"):
        engine.restore(1, damaged)
    assert engine.blocks.free == 62


@library
def test_a_closed_engine_is_refused(toy):
    engine = LlamaCppEngine(toy("llama", "F32"), blocks=8, threads=1)
    logits(engine, IDS[:20])
    engine.close()
    engine.close()
    for use in (lambda: logits(engine, IDS[:5]), lambda: engine.fork(0, 1), lambda: engine.remove(0)):
        with pytest.raises(EdgekitError, match="was closed"):
            use()


@library
@pytest.mark.parametrize("engine", ["torch", "llamacpp"])
def test_bench_shows_it_beside_another_engine_in_the_same_run(edgekit, tmp_path, engine):
    path = toy_model(tmp_path, "llama", "Q4_0")
    arguments = ("--contexts", "16,40", "--rounds", "3", "--threads", "1", "--json")
    if engine == "torch":  # it takes no threads
        arguments = (*arguments[:4], "--json")
    found = edgekit("llm", "bench", str(path), "--engine", engine, *arguments)
    rows = json.loads(found.out)["rows"]
    expected = [(name, at) for at in (16, 40) for name in dict.fromkeys((engine, "llamacpp"))]
    assert [(row["engine"], row["context"]) for row in rows] == expected
    assert all(row["seconds"] > 0 for row in rows)


def test_bench_says_why_llama_cpp_is_not_beside_it(edgekit, tmp_path, monkeypatch):
    path = toy_model(tmp_path, "llama", "Q4_0")
    monkeypatch.setenv(llamacpp_library.VARIABLE, str(tmp_path))
    found = edgekit("llm", "bench", str(path), "--engine", "torch", "--contexts", "16", "--rounds", "3", "--json")
    assert [row["engine"] for row in json.loads(found.out)["rows"]] == ["torch"]
    assert "llama.cpp is not beside it" in found.err


# --- the probe of the layout


def defaults(flags_at):
    """The default parameters as a library gives them."""
    context, model = bytearray(512), bytearray(512)
    for content, fields in ((context, CONTEXT), (model, MODEL)):
        for at, value in fields.values():
            content[at : at + 4] = value.to_bytes(4, "little", signed=True)
    context[flags_at : flags_at + len(FLAGS)] = FLAGS
    return bytes(context), bytes(model)


def test_a_known_layout_is_found_and_another_one_refused():
    for at in (128, 136):
        context, model = defaults(at)
        assert layout_of(context, model).flags == at
        for at_fault in (0, 12, 32, 108, at + 1):
            wrong = bytearray(context)
            wrong[at_fault] += 1
            assert layout_of(bytes(wrong), model) is None
        assert layout_of(bytes(4) + context, model) is None  # a field more at the beginning
        assert layout_of(context, bytes(8) + model) is None
    assert layout_of(*defaults(132)) is None


def test_a_library_that_is_none_is_refused(tmp_path, monkeypatch):
    text, other = tmp_path / "libllama.so", Path(np.__file__).parent
    text.write_text("not a library")
    with pytest.raises(EdgekitError, match="cannot be loaded"):
        llamacpp_library.Library(llamacpp_library.find(tmp_path))
    monkeypatch.setenv(llamacpp_library.VARIABLE, str(other))
    with pytest.raises(EdgekitError, match=r"no folder with a libllama\.so"):
        llamacpp_library.find()
    extension = next(other.rglob("_multiarray_umath*.so"))
    with pytest.raises(EdgekitError, match="has no function llama_context_default_params"):
        llamacpp_library.Library(llamacpp_library.find(extension))
