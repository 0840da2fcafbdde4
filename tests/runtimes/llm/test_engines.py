"""Engines against a reference of other people, against each other, and against themselves under other schedules."""

import shutil
import subprocess
from contextlib import closing

import numpy as np
import pytest

from edgekit.errors import EdgekitError
from runtimes.llm.blocks import NoBlocksError
from runtimes.llm.engine import Item
from runtimes.llm.native_engine import FLAGS, NativeEngine, source_of
from runtimes.llm.torch_engine import TorchEngine
from tests.runtimes.llm.conftest import compiler

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


@compiler
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_the_native_engine_is_near_the_reference(toy, family, form, kv):
    model = toy(family, form)
    expected = run(TorchEngine(model, blocks=8, dtype="float64"))
    with closing(NativeEngine(model, blocks=8, kv=kv, threads=2)) as engine:
        found = run(engine)
    away = np.abs(found - expected).max() / np.abs(expected).max()
    assert away < AWAY
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
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_other_head_sizes_and_numbers_of_queries_to_a_key(toy, sizes, kv):
    model = toy("qwen2", "F32", **sizes)
    expected = run(TorchEngine(model, blocks=8, dtype="float64"))
    with closing(NativeEngine(model, blocks=40, kv=kv, threads=1, flags=("-march=native", "-O1"))) as engine:
        assert np.abs(run(engine) - expected).max() / np.abs(expected).max() < AWAY
        engine.remove(0)
        check_schedules(engine, np.array_equal)


@compiler
@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "F16"])
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_logits_are_the_same_bits_under_every_schedule_and_number_of_threads(toy, form, kv):
    model, found = toy("llama", form), []
    for threads in (1, 2, 3):
        with closing(NativeEngine(model, blocks=40, kv=kv, threads=threads)) as engine:
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
    assert shared == 80
    assert equal(run(engine, IDS[shared:], 5), expected[shared:])
    # a layer at a time, with other work between; and given up half-way, then done again
    given_up = engine.start([Item(6, IDS[:20])])
    given_up.advance()
    assert engine.length(6) == 0
    engine.remove(6)
    between = []
    assert equal(engine.step([Item(6, IDS[:30], logits="all")], between.append)[0], expected[:30])
    assert between == [1]
    for sequence in list(engine.blocks.tables):
        engine.remove(sequence)
    assert engine.blocks.free == engine.blocks.number
    return expected


@compiler
@pytest.mark.parametrize("kv", ["f16", "int8"])
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


# --- other machines


def step_on(engine):
    with closing(engine):
        return run(engine), engine.lanes


@pytest.mark.machines
@compiler
@pytest.mark.parametrize("form", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("kv", ["f16", "int8"])
def test_plain_c_and_avx2_give_the_same_bits_as_this_machine(toy, form, kv):
    model = toy("qwen3", form)
    expected, own = step_on(NativeEngine(model, blocks=8, kv=kv))
    plain, name = step_on(NativeEngine(model, blocks=8, kv=kv, flags=("-DPLAIN_C",)))
    assert name == "plain C"
    assert np.array_equal(plain, expected)
    if own == "AVX-512 VNNI":
        narrow, name = step_on(NativeEngine(model, blocks=8, kv=kv, flags=("-mavx2", "-mfma", "-mf16c")))
        assert name == "AVX2"
        assert np.array_equal(narrow, expected)


CHECK = """
#include <stdio.h>
/* runs all kernels on numbers from a generator, and prints a hash of what they give */
static uint32_t state = 1, hash = 2166136261u;
static uint32_t next(void) { state = state * 1664525u + 1013904223u; return state >> 8; }
static void mix(const void *from, size_t size)
{
    for (size_t i = 0; i < size; i++)
        hash = (hash ^ ((const uint8_t *)from)[i]) * 16777619u;
}
int main(void)
{
    enum { ROWS = 48, INPUTS = 96, STEPS = 11, BLOCKS = 3 };
    float *values = malloc(sizeof(float) * STEPS * INPUTS);
    uint8_t *raw = malloc(ROWS * INPUTS * 4);
    Activations of;
    make_activations(&of, INPUTS, STEPS);
    for (int i = 0; i < STEPS * INPUTS; i++)
        values[i] = (float)(int)(next() % 2001 - 1000) / 300.0f;
    for (int i = 0; i < STEPS; i++)
        quantise(values + i * INPUTS, i % 2 ? values : NULL, 1e-5f, &of, i);
    mix(of.codes, STEPS * INPUTS);
    for (int format = Q4_0; format <= F32; format++) {
        Matrix matrix = {format, ROWS, INPUTS, allocate(3 * tile_bytes(format, INPUTS))};
        const size_t row_bytes = (size_t[]){54, 60, 102, 192, 192, 384}[format];
        for (int row = 0; row < ROWS; row++) {
            for (size_t i = 0; i < row_bytes; i++)
                raw[i] = (uint8_t)next();
            for (size_t i = 0; format <= Q8_0 && i < row_bytes; i += row_bytes / 3) { /* scales of about 1 */
                raw[i + 1] = 60;
                if (format == Q4_1)
                    raw[i + 3] = 52;
            }
            for (size_t i = 1; format >= F16 && format <= BF16 && i < row_bytes; i += 2)
                raw[i] = 60;
            for (size_t i = 0; format == F32 && i < row_bytes; i += 4)
                raw[i + 3] = 63;
            pack_row(&matrix, row, raw);
        }
        floats sums[MOST_TOKENS];
        for (int tile = 0; tile < ROWS / 16; tile++)
            for (int first = 0; first < STEPS; first += MOST_TOKENS) {
                const int tokens = STEPS - first < MOST_TOKENS ? STEPS - first : MOST_TOKENS;
                product(&matrix, tile, &of, first, tokens, sums);
                mix(sums, sizeof(floats) * tokens);
            }
        unpack_row(&matrix, 37, values);
        mix(values, sizeof(float) * INPUTS);
    }
    for (int cache = CACHE_F16; cache <= CACHE_INT8; cache++) {
        uint8_t *pool = allocate(BLOCKS * block_bytes(cache));
        float key[HEAD_SIZE], value[HEAD_SIZE], query[MOST_QUERIES * HEAD_SIZE], output[MOST_QUERIES * HEAD_SIZE];
        const int32_t table[BLOCKS] = {2, 0, 1};
        for (int t = 0; t < 40; t++) {
            for (int i = 0; i < HEAD_SIZE; i++) {
                key[i] = (float)(int)(next() % 2001 - 1000) / 500.0f;
                value[i] = (float)(int)(next() % 2001 - 1000) / 500.0f;
            }
            put(cache, pool + table[t / BLOCK] * block_bytes(cache), t % BLOCK, key, value);
        }
        for (int i = 0; i < MOST_QUERIES * HEAD_SIZE; i++)
            query[i] = (float)(int)(next() % 2001 - 1000) / 500.0f;
        Attention work = {.pool = pool, .table = table, .length = 40, .stride = 64};
        work.scores = malloc(sizeof(float) * MOST_QUERIES * 64);
        for (int i = 0; i < MOST_QUERIES; i++) {
            work.queries[i] = query + i * HEAD_SIZE;
            work.outputs[i] = output + i * HEAD_SIZE;
        }
        const int tokens = cache == CACHE_F16 ? 2 : 1;
        attend(cache, &work, tokens);
        mix(output, sizeof(float) * tokens * QUERIES * HEAD_SIZE);
        free(work.scores);
    }
    free(values);
    free(raw);
    printf("%s %08x\\n", LANES_NAME, hash);
    return 0;
}
"""


def check_program(toy, tmp_path, command, flags, run_with=()):
    """Compile the kernels with a program that prints a hash of their results, and run it."""
    source = tmp_path / "check.c"
    source.write_text(source_of(toy("llama", "Q4_0").architecture) + CHECK)
    program = tmp_path / "check"
    subprocess.run([command, *FLAGS, *flags, str(source), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([*run_with, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    lanes, _, digest = done.stdout.strip().rpartition(" ")
    return lanes, digest


@pytest.mark.machines
@compiler
def test_kernels_hash_alike_in_plain_c_and_with_vectors(toy, tmp_path):
    plain, vectors = (check_program(toy, tmp_path, "cc", [flag])[1] for flag in ("-DPLAIN_C", "-march=native"))
    assert vectors == plain
    # a compiler that may contract a product and a sum rounds otherwise, and the hash shows it
    assert check_program(toy, tmp_path, "cc", ["-march=native", "-ffast-math", "-U__FAST_MATH__"])[1] != plain


@pytest.mark.machines
@pytest.mark.skipif(
    not all(map(shutil.which, ("aarch64-linux-gnu-gcc", "qemu-aarch64"))),
    reason="no compiler and emulator of 64-bit ARM here: apt-get install gcc-aarch64-linux-gnu qemu-user",
)
@pytest.mark.parametrize(("flags", "name"), [([], "NEON"), (["-march=armv8.2-a+dotprod"], "NEON dot product")])
def test_neon_hashes_like_plain_c(toy, tmp_path, flags, name):
    expected = check_program(toy, tmp_path, "cc", ["-DPLAIN_C"])[1]
    flags = [*flags, "-static"]
    lanes, found = check_program(toy, tmp_path, "aarch64-linux-gnu-gcc", flags, ["qemu-aarch64", "-cpu", "max"])
    assert lanes == name
    assert found == expected


@pytest.mark.machines
@compiler
def test_the_sanitizers_find_nothing(toy, tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-march=native"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }")
    if subprocess.run(
        ["cc", *flags, str(probe), "-o", str(tmp_path / "probe")], capture_output=True, check=False
    ).returncode:
        pytest.skip("this compiler comes without the sanitizers' libraries")
    assert check_program(toy, tmp_path, "cc", flags)[1] == check_program(toy, tmp_path, "cc", ["-DPLAIN_C"])[1]


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
    ],
)
def test_wrong_items_are_refused_before_anything_changes(toy, items, problem):
    engine = TorchEngine(toy(), blocks=8)
    with pytest.raises(EdgekitError, match=problem):
        engine.step(items)
    assert engine.blocks.free == 8


def test_a_full_cache_is_told_before_anything_is_computed(toy):
    engine = TorchEngine(toy(), blocks=5)
    with pytest.raises(NoBlocksError, match="6 blocks are needed, and 5 of 5 are free"):
        run(engine)
    assert run(engine, IDS[:80]).shape == (80, 307)


@compiler
def test_options_and_models_that_the_native_engine_cannot_run_are_refused(toy, monkeypatch):
    for options, problem in (({"kv": "int3"}, "'int3'"), ({"threads": 1000}, "threads"), ({"blocks": 0}, "blocks = 0")):
        with pytest.raises(EdgekitError, match=problem):
            NativeEngine(toy(), **options)
    with pytest.raises(EdgekitError, match="head size 24"):
        NativeEngine(toy("llama", "F32", head_size=24))
    with closing(NativeEngine(toy(), rows=16)) as engine, pytest.raises(EdgekitError, match="takes up to 16"):
        run(engine)
    monkeypatch.setattr("runtimes.llm.native_engine.available_memory", lambda: 1000)
    with pytest.raises(EdgekitError, match=r"for weights and [\d,]+ for a cache of 8,192 tokens, and 1,000 are free"):
        NativeEngine(toy())
