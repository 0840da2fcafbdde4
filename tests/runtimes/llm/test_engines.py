"""Engines against a reference of other people, against each other, and against themselves under other schedules."""

import os
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.blocks import NoBlocksError
from runtimes.llm.engine import Item
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.torch_engine import TorchEngine
from tests.gguf_files import toy_model
from tests.runtimes.llm.conftest import compiler
from tests.runtimes.llm.kivi import KiviEngine

IDS = np.random.default_rng(7).integers(0, 300, 90)
FORMATS = ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_0"]
# of the largest logit, between 8-bit and exact activations, on weights of noise: F32 shows the activations' share alone
AWAY = 0.06


def run(engine, ids=IDS, sequence=0):
    """Return (tokens, vocabulary) the logits of one step."""
    return engine.step([Item(sequence, np.asarray(ids), logits="all")])[0]


def in_chunks(engine, size, sequence, ids=IDS):
    return np.concatenate([run(engine, ids[at : at + size], sequence) for at in range(0, len(ids), size)])


# --- the reference is right


@pytest.mark.parametrize(("family", "name"), [("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")])
@pytest.mark.parametrize("tied", [True, False])
def test_the_torch_engine_computes_what_transformers_does(toy, family, name, tied):
    transformers = pytest.importorskip("transformers", reason="pip install 'edgekit[transformers]'")
    import torch

    model = toy(family, "F32", tied=tied)
    of = model.architecture
    config = getattr(transformers, f"{name}Config")(
        vocab_size=of.vocabulary, hidden_size=of.width, intermediate_size=of.hidden, num_hidden_layers=of.layers,
        num_attention_heads=of.heads, num_key_value_heads=of.kv_heads, head_dim=of.head_size, rms_norm_eps=of.epsilon,
        rope_theta=of.rope.base, rope_parameters={"rope_type": "default", "rope_theta": of.rope.base},
        max_position_embeddings=of.context, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    network = getattr(transformers, f"{name}ForCausalLM")(config).double().eval()

    def halves(values, heads):
        """Rows of a head from neighbours to halves, as transformers turns them."""
        if of.rope.pairs == "halves":
            return values
        return values.reshape(heads, of.head_size // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)

    def put(parameter, tensor, heads=0):
        values = tensor.values()
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(halves(values, heads) if heads else values))

    put(network.model.embed_tokens.weight, model.embedding)
    put(network.lm_head.weight, model.head)
    put(network.model.norm.weight, model.norm)
    for block, layer in zip(network.model.layers, model.layers, strict=True):
        attention = block.self_attn
        for part, role, heads in (("q", "query", of.heads), ("k", "key", of.kv_heads), ("v", "value", 0)):
            projection = getattr(attention, f"{part}_proj")
            put(projection.weight, getattr(layer, role), heads)
            if projection.bias is not None:
                put(projection.bias, getattr(layer, f"{role}_bias"))
            if family == "qwen3" and part != "v":
                put(getattr(attention, f"{part}_norm").weight, getattr(layer, f"{role}_norm"))
        put(attention.o_proj.weight, layer.attention_output)
        put(block.input_layernorm.weight, layer.attention_norm)
        put(block.post_attention_layernorm.weight, layer.mlp_norm)
        for part in ("gate", "up", "down"):
            put(getattr(block.mlp, f"{part}_proj").weight, getattr(layer, part))
    with torch.no_grad():
        expected = network(torch.from_numpy(IDS)[None]).logits[0].numpy()
    found = run(TorchEngine(model, blocks=8, dtype="float64"))
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    other = run(TorchEngine(toy(family, "Q4_0", tied=tied), blocks=8, dtype="float64"))
    assert np.abs(other - expected).max() > 1e-2 * np.abs(expected).max()  # other weights are seen


def test_the_torch_engine_gives_the_same_in_chunks_and_after_each_change_of_a_sequence(toy):
    engine = TorchEngine(toy(), blocks=40, dtype="float64")
    check_schedules(engine, lambda found, expected: np.allclose(found, expected, rtol=0, atol=1e-5))


# --- the native engine

REFERENCE = {"f16": TorchEngine, "int8": TorchEngine, "int4": KiviEngine}


@compiler
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_the_native_engine_is_near_the_reference(toy, family, form, kv):
    model = toy(family, form)
    expected = run(REFERENCE[kv](model, blocks=8, dtype="float64"))
    with closing(NativeEngine(model, blocks=8, kv=kv, threads=2)) as engine:
        found = run(engine)
    away = np.abs(found - expected).max() / np.abs(expected).max()
    # activations in 8 bits move some keys and values to the next step of 4 bits
    assert away < (3 * AWAY if kv == "int4" and form.startswith("Q") else AWAY)
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.8
    assert np.abs(found[1:] - expected[:-1]).max() / np.abs(expected).max() > 5 * AWAY  # another token's are far


@pytest.mark.machines
@compiler
@pytest.mark.parametrize(
    "sizes",
    [
        {"head_size": 16, "heads": 8, "kv_heads": 1},
        {"head_size": 48, "heads": 2, "kv_heads": 2},
        {"head_size": 64, "heads": 9, "kv_heads": 3, "width": 96},
        {"head_size": 128, "heads": 14, "kv_heads": 2, "hidden": 160},
        {"head_size": 256, "heads": 4, "kv_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_other_head_sizes_and_numbers_of_queries_to_a_key(toy, sizes, kv):
    model = toy("qwen2", "F32", **sizes)
    expected = run(REFERENCE[kv](model, blocks=8, dtype="float64"))
    with closing(NativeEngine(model, blocks=80, kv=kv, threads=1, flags=("-march=native", "-O1"))) as engine:
        assert np.abs(run(engine) - expected).max() / np.abs(expected).max() < AWAY
        engine.remove(0)
        check_schedules(engine, np.array_equal)


def random_sizes(rng):
    """Return the sizes of a model that the native engine can run."""
    while True:
        head_size, kv_heads = 16 * int(rng.integers(1, 17)), int(rng.integers(1, 4))
        heads = kv_heads * int(rng.integers(1, 17))
        if heads * head_size % 32 == 0 and heads * head_size <= 4096:
            return {
                "head_size": head_size,
                "heads": heads,
                "kv_heads": kv_heads,
                "width": 32 * int(rng.integers(1, 7)),
                "hidden": 32 * int(rng.integers(1, 9)),
                "vocabulary": int(rng.integers(301, 400)),
                "layers": int(rng.integers(2, 4)),
                "rope_size": 2 * int(rng.integers(1, head_size // 2 + 1)),
            }


@pytest.mark.machines
@compiler
@pytest.mark.parametrize("seed", range(8))
def test_random_architectures(toy, seed):
    rng = np.random.default_rng(seed)
    family, form = ("llama", "qwen2", "qwen3")[seed % 3], FORMATS[seed % len(FORMATS)]
    model = toy(family, form, tied=bool(seed % 2), **random_sizes(rng))
    references = {kind: run(kind(model, blocks=8, dtype="float64")) for kind in (TorchEngine, KiviEngine)}
    for kv, threads in (("f16", 3), ("int8", 2), ("int4", 2)):
        options = {"kv": kv, "threads": threads, "flags": ("-march=native", "-O1")}
        expected = references[REFERENCE[kv]]
        with closing(NativeEngine(model, blocks=80, **options)) as engine:
            assert np.abs(run(engine) - expected).max() / np.abs(expected).max() < 2 * AWAY
            engine.remove(0)
            check_schedules(engine, np.array_equal)


@compiler
@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "F16"])
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_logits_are_the_same_bits_under_every_schedule_and_number_of_threads(toy, form, kv):
    model, found = toy("llama", form), []
    for threads in (1, 2, 3):
        with closing(NativeEngine(model, blocks=80, kv=kv, threads=threads)) as engine:
            found.append(check_schedules(engine, np.array_equal))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def check_schedules(engine, equal):
    """Compute the same tokens in all ways that there are; return their logits."""
    expected = run(engine, sequence=100).copy()
    for size in (1, 17, 64):
        assert equal(in_chunks(engine, size, sequence=size), expected)
        engine.remove(size)
    # a ragged batch: a chunk, a single token, and a new sequence
    engine.step([Item(0, IDS[:40]), Item(1, IDS[:33])])
    mixed = engine.step([Item(0, IDS[40:70], logits="all"), Item(1, IDS[33:34]), Item(2, IDS[:9])])
    assert equal(mixed[0], expected[40:70])
    assert equal(mixed[1], expected[33:34])
    assert equal(mixed[2], expected[8:9])
    # a fork, cut back and continued, and its parent, which it must not have changed
    engine.fork(0, 3)
    engine.truncate(3, 50)
    both = engine.step([Item(3, IDS[50:60], logits="all"), Item(0, IDS[70:71])])
    assert equal(both[0], expected[50:60])
    assert equal(both[1], expected[70:71])
    # saved, restored under another number, continued
    saved = engine.save(0)
    engine.remove(0)
    engine.restore(4, saved)
    assert equal(run(engine, IDS[71:], 4), expected[71:])
    # begun with what another sequence has computed
    shared = engine.reuse(5, IDS)
    assert shared == 89 // engine.blocks.size * engine.blocks.size
    assert equal(run(engine, IDS[shared:], 5), expected[shared:])
    # a layer at a time, with other work between; and given up half-way, then done again
    given_up = engine.start([Item(6, IDS[:20])])
    given_up.advance()
    assert engine.length(6) == 0
    engine.remove(6)
    between = []
    assert equal(engine.step([Item(6, IDS[:30], logits="all")], between.append)[0], expected[:30])
    assert between == list(range(1, engine.architecture.layers))
    # given up after it took blocks; then forked and saved, and all three go on
    engine.start([Item(6, IDS[30:80])]).advance()
    engine.fork(6, 7)
    saved = engine.save(6)
    assert equal(run(engine, IDS[30:60], 6), expected[30:60])
    assert equal(run(engine, IDS[30:50], 7), expected[30:50])
    assert equal(run(engine, IDS[60:], 6), expected[60:])
    engine.remove(6)
    engine.restore(6, saved)
    assert equal(run(engine, IDS[30:], 6), expected[30:])
    for sequence in list(engine.blocks.tables):
        engine.remove(sequence)
    assert engine.blocks.free == engine.blocks.number
    return expected


@compiler
@pytest.mark.parametrize("kv", ["f16", "int8", "int4"])
def test_embeddings_go_in_as_tokens_do(toy, kv):
    model = toy("llama", "F32")
    rows = model.embedding.values()[IDS]
    with closing(NativeEngine(model, blocks=32, kv=kv)) as engine:
        expected = run(engine)
        assert np.array_equal(run(engine, rows, 1), expected)
        mixed = engine.step([Item(2, IDS[:20], logits="all"), Item(3, rows[:20], logits="all")])
        assert np.array_equal(mixed[0], mixed[1])
        assert np.array_equal(run(engine, rows[20:50], 2), expected[20:50])


@compiler
def test_positions_that_are_given_replace_the_next_ones(toy):
    model = toy("llama", "F32")
    gaps = np.arange(90) * 3
    reference = TorchEngine(model, blocks=16, dtype="float64")
    expected = reference.step([Item(0, IDS, positions=gaps, logits="all")])[0]
    with closing(NativeEngine(model, blocks=16)) as engine:
        found = engine.step([Item(0, IDS, positions=gaps, logits="all")])[0]
        assert np.abs(found - expected).max() / np.abs(expected).max() < AWAY
        assert np.abs(run(engine, sequence=1) - expected).max() / np.abs(expected).max() > AWAY


# --- what is refused


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([], "at least one item"),
        ([Item(0, np.zeros(0, np.int64))], "at least one token"),
        ([Item(0, np.array([307]))], "outside 0 to 306"),
        ([Item(0, np.array([-1]))], "outside 0 to 306"),
        ([Item(0, np.zeros((2, 63), np.float32))], "expected"),
        ([Item(0, np.full((1, 64), np.nan, np.float32))], "NaN"),
        ([Item(0, IDS), Item(0, IDS)], "twice"),
        ([Item(0, IDS[:1], positions=np.array([2048]))], "the model's context"),
        ([Item(0, IDS[:2], positions=np.array([1]))], "expected one for each"),
        ([Item(0, IDS[:1], positions=np.array([1.0]))], "positions are float64 of shape"),
    ],
)
def test_wrong_items_are_refused_before_anything_changes(toy, items, problem):
    engine = TorchEngine(toy(), blocks=8)
    with pytest.raises(EdgekitError, match=problem):
        engine.step(items)
    assert engine.blocks.free == 8


def test_a_step_is_over_when_the_next_one_begins(toy):
    engine = TorchEngine(toy(), blocks=8)
    first = engine.start([Item(0, IDS[:5])])
    for layers in (0, -1):
        with pytest.raises(EdgekitError, match=f"advance by {layers} layers"):
            first.advance(layers)
    first.advance()
    run(engine, IDS[:5], 1)
    for use in (first.advance, first.logits):
        with pytest.raises(EdgekitError, match="this step was given up"):
            use()
    assert engine.length(0) == 0


@compiler
def test_a_saved_state_of_another_engine_is_refused(toy):
    with closing(NativeEngine(toy(), blocks=8)) as halves, closing(NativeEngine(toy(), blocks=8, kv="int8")) as bytes_:
        run(halves)
        with pytest.raises(EdgekitError, match="restore it to an engine of the same"):
            bytes_.restore(0, halves.save(0))
        assert bytes_.blocks.free == 8
        with pytest.raises(EdgekitError, match="restore it to an engine of the same"):
            TorchEngine(toy(), blocks=8).restore(0, halves.save(0))


@compiler
def test_an_engine_that_was_closed_is_refused_and_not_used(toy):
    engine = NativeEngine(toy(), blocks=8)
    run(engine, IDS[:20])
    engine.close()
    engine.close()
    for use in (lambda: run(engine, IDS[:5]), lambda: engine.save(0), lambda: engine.copy_block(0, 1)):
        with pytest.raises(EdgekitError, match="was closed"):
            use()


FORKED = """
import os, sys
from pathlib import Path
import numpy as np
from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm.architecture import from_gguf
from runtimes.llm.engine import Item
from runtimes.llm.native_engine import NativeEngine

engine = NativeEngine(from_gguf(read_gguf(Path(sys.argv[1]))), blocks=8, threads=2)
ids = np.arange(20)
expected = engine.step([Item(0, ids)])[0]
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    again = engine.step([Item(1, ids)])[0]
    sys.exit(status if np.array_equal(again, expected) else 4)
try:
    engine.step([Item(1, ids)])
except EdgekitError as error:
    sys.exit(3 if "load the model again in this process" in str(error) else 5)
"""


@compiler
def test_a_forked_process_is_told_to_load_the_model_again_and_can_end(toy, tmp_path):
    path = toy_model(tmp_path)
    done = subprocess.run([sys.executable, "-c", FORKED, str(path)], check=False, timeout=60, env=os.environ)
    assert done.returncode == 3


def test_a_full_cache_is_told_before_anything_is_computed(toy):
    engine = TorchEngine(toy(), blocks=5)
    with pytest.raises(NoBlocksError, match="6 blocks are needed, and 5 of 5 are free"):
        run(engine)
    assert run(engine, IDS[:80]).shape == (80, 307)


@compiler
def test_options_and_models_that_the_native_engine_cannot_run_are_refused(toy, monkeypatch):
    for options, problem in (
        ({"kv": "int3"}, "'int3'"),
        ({"threads": 1000}, "threads = 1000"),
        ({"threads": 0}, "threads = 0"),
        ({"blocks": 0}, "blocks = 0"),
        ({"blocks": 1 << 40}, "blocks = 1099511627776"),
        ({"rows": 1 << 20}, "rows = 1048576"),
    ):
        with pytest.raises(EdgekitError, match=problem):
            NativeEngine(toy(), **options)
    with pytest.raises(EdgekitError, match="head size 24"):
        NativeEngine(toy("llama", "F32", head_size=24))
    with pytest.raises(EdgekitError, match="48 values of all heads; expected multiples of 32"):
        NativeEngine(toy("llama", "F32", head_size=16, heads=3, kv_heads=3))
    with closing(NativeEngine(toy(), rows=16)) as engine:
        with pytest.raises(EdgekitError, match="takes up to 16"):
            run(engine)
        assert engine.blocks.free == engine.blocks.number
        assert engine.length(0) == 0
    monkeypatch.setattr("runtimes.llm.native_engine.memory_bytes", lambda: (2000, 1000))
    with pytest.raises(EdgekitError, match=r"for weights and [\d,]+ for a cache of 8,192 tokens, and 1,000 are free"):
        NativeEngine(toy())
