"""Each policy of the key-value cache, layer by layer, against naive references, exact limits and counted bytes."""

import functools
import math

import numpy as np
import pytest
import torch

from edgekit.importers.gguf import read_gguf
from runtimes.llm.architecture import from_gguf
from runtimes.llm.kv.cache import LayerCache, Prompt, Read, Shape, Tokens, memory
from runtimes.llm.kv.codes import packed, quantized, unpacked
from runtimes.llm.kv.d2o import D2O, D2OLayer, divided
from runtimes.llm.kv.gear import Gear
from runtimes.llm.kv.h2o import H2O, H2OLayer
from runtimes.llm.kv.hadamard import rotation
from runtimes.llm.kv.kivi import Kivi
from runtimes.llm.kv.low_rank import low_rank
from runtimes.llm.kv.per_token import PerToken
from runtimes.llm.kv.policies import POLICIES
from runtimes.llm.kv.shadowkv import ShadowKV
from runtimes.llm.kv.snapkv import SnapKV
from runtimes.llm.kv.streaming import Streaming
from runtimes.llm.kv.window import Window
from runtimes.llm.torch_engine import TorchEngine
from tests.gguf_files import toy_model

HEADS, GROUP, SIZE = 2, 3, 16


class Drive:
    """Random tokens that go through caches, and what attention of random queries gives."""

    def __init__(self, shape, tokens, seed=0, spread=1.0):
        random = torch.Generator().manual_seed(seed)

        def noise(heads):
            return torch.randn(heads, tokens, SIZE, generator=random, dtype=torch.float64)

        self.shape = shape
        self.raw = (noise(HEADS) * torch.linspace(0.2, 1 + spread, SIZE).double()).half().double()
        self.positions = torch.arange(tokens)
        self.keys = shape.rotate(self.raw, self.positions[None])
        self.values, self.queries = noise(HEADS).half().double(), 2 * noise(HEADS * GROUP)

    def tokens(self, start, end):
        part = slice(start, end)
        index = self.positions[part]
        return Tokens(self.raw[:, part], self.keys[:, part], self.values[:, part], index, index)

    def feed(self, cache, start, end):
        """Append tokens one by one, and return (heads, tokens, size) what attention gave."""
        found = []
        for at in range(start, end):
            cache.append(self.tokens(at, at + 1))
            queries = self.queries[:, at : at + 1]
            seen = cache.read(queries)
            scores = queries.unflatten(0, (HEADS, GROUP)) @ seen.keys.mT[:, None] / SIZE**0.5
            weights = scores.masked_fill(seen.index[:, None, None] > at, -torch.inf).softmax(-1)
            found.append((weights @ seen.values[:, None]).flatten(0, 1))
            cache.observe(weights)
            cache.settle()
        return torch.cat(found, 1)

    def prompt(self, tokens):
        prompt = Prompt(self.shape)
        self.feed(prompt, 0, tokens)
        return prompt


@pytest.fixture(scope="module")
def drive(tmp_path_factory):
    sizes = {"head_size": SIZE, "heads": HEADS * GROUP, "kv_heads": HEADS, "width": 96}
    path = toy_model(tmp_path_factory.mktemp("models"), "llama", "F32", **sizes)
    engine = TorchEngine(from_gguf(read_gguf(path)), blocks=1, dtype="float64")
    return Drive(Shape(HEADS, SIZE, torch.float64, torch.device("cpu"), functools.partial(engine._rotated_at, 0)), 200)


def begun(policy, drive, tokens):
    (layer,) = policy.begin([drive.prompt(tokens)])
    return layer


# --- codes


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_come_back_from_bytes_of_the_right_number(bits):
    codes = torch.from_numpy(np.random.default_rng(bits).integers(0, 1 << bits, (3, 5, 48)).astype(np.uint8))
    stored = packed(codes, bits)
    assert stored.dtype == torch.uint8
    assert stored.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpacked(stored, bits).to(torch.uint8), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("axis", [-1, -2])
def test_quantised_numbers_are_within_half_a_step(bits, axis):
    exact = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).half().double()
    step = (exact.amax(axis, keepdim=True) - exact.amin(axis, keepdim=True)) / (2**bits - 1)
    error = (quantized(exact, axis, bits).values(torch.float64) - exact).abs()
    assert (error <= 0.501 * step + 2e-3 * exact.abs().amax()).all()
    assert (error > 0.3 * step).any()  # it is no finer than the bits say
    constant = torch.full((1, 4, 8), 0.7, dtype=torch.float64).half().double()
    assert torch.equal(quantized(constant, axis, bits).values(torch.float64), constant)


def test_the_rotation_of_hadamard_is_orthogonal_and_spreads_an_outlier():
    matrix = rotation(64)
    assert torch.allclose(matrix @ matrix, torch.eye(64, dtype=torch.float64), atol=1e-12)
    entries = [[(-1) ** bin(row & column).count("1") / 8 for column in range(64)] for row in range(64)]
    assert torch.allclose(matrix, torch.tensor(entries, dtype=torch.float64))
    outlier = torch.zeros(64, dtype=torch.float64)
    outlier[5] = 8.0
    assert (outlier @ matrix).abs().max() < 1.001


def test_rotation_helps_heads_with_outliers(drive):
    rows = torch.randn(HEADS, 40, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows[..., 3] *= 30
    tokens = Tokens(rows, rows, rows, torch.arange(40), torch.arange(40))
    error = {}
    for name in ("hadamard", "int8:4"):
        policy = POLICIES["hadamard"] if name == "hadamard" else type(POLICIES["int8"])(4)
        (layer,) = policy.begin([Prompt(drive.shape)])
        layer.append(tokens)
        error[name] = (layer.read(rows).keys - rows)[..., :3].abs().mean()
    assert error["hadamard"] < error["int8:4"]


# --- low rank and GEAR


def test_low_rank_is_the_best_there_is_and_exact_at_full_rank():
    rows = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    errors = []
    for rank in range(13):
        left, right = low_rank(rows, rank)
        assert left.shape == (2, 50, rank)
        assert right.shape == (2, 12, rank)
        errors.append(float((left.double() @ right.double().mT - rows).norm()))
        best = torch.linalg.svdvals(rows)[:, rank:].norm()
        assert errors[-1] == pytest.approx(float(best), rel=2e-3, abs=2e-2)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


def gear_by_hand(exact, policy, rank, axis):
    """The formulas of GEAR in numpy, number by number: (heads, tokens, size) after compression."""
    heads, tokens, size = exact.shape
    vectors = (
        [[(h, t, d) for t in range(tokens)] for h in range(heads) for d in range(size)]
        if axis == 1
        else [[(h, t, d) for h in range(heads) for d in range(size)] for t in range(tokens)]
    )
    filled, outliers = exact.copy(), []
    for vector in vectors:
        count = min(len(vector), max(2, round(policy.outliers * len(vector)))) if policy.outliers else 0
        by_size = sorted(vector, key=lambda at: exact[at])
        found = by_size[: count - count // 2] + by_size[len(vector) - count // 2 :]
        for at in found:
            filled[at] = np.mean([exact[other] for other in vector])
        outliers += found
    groups = {}
    for h, t, d in np.ndindex(exact.shape):
        block = t // policy.buffer if policy.backbone == "kivi" else 0
        head = h if policy.backbone == "kivi" or axis == 1 else 0
        groups.setdefault((h, block, d) if axis == 1 else (head, t), []).append((h, t, d))
    coded = np.empty_like(exact)
    for group in groups.values():
        numbers = np.array([filled[at] for at in group])
        scale = np.float64(np.float16((numbers.max() - numbers.min()) / (2**policy.bits - 1)))
        least = np.float64(np.float16(numbers.min()))
        for at, number in zip(group, numbers, strict=True):
            coded[at] = np.clip(np.round((number - least) / scale), 0, 2**policy.bits - 1) * scale + least
    error = exact - coded
    for at in outliers:
        error[at] = 0
    left, values, right = np.linalg.svd(error, full_matrices=False)
    found = coded + (left[..., :rank] * values[:, None, :rank]) @ right[:, :rank]
    for at in outliers:
        found[at] = exact[at]
    return found


@pytest.mark.parametrize("backbone", ["kcvt", "kivi"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_gear_equals_its_formulas(drive, backbone, rank, outliers):
    policy = Gear(bits=2, rank=rank, new_rank=1, outliers=outliers, buffer=16, backbone=backbone)
    layer = begun(policy, drive, 40)  # 32 tokens in a chunk, and 8 in the buffer
    drive.feed(layer, 40, 50)  # another chunk, and 2 in the buffer
    seen = layer.read(drive.queries)
    for found, exact, axis in ((seen.keys, drive.keys.half().double(), 1), (seen.values, drive.values, 2)):
        parts = [
            gear_by_hand(exact[:, :32].numpy(), policy, rank, axis),
            gear_by_hand(exact[:, 32:48].numpy(), policy, 1, axis),
            exact[:, 48:50].numpy(),
        ]
        expected = np.concatenate(parts, 1)
        assert np.abs(found.numpy() - expected).max() < 5e-3
        assert np.abs(found.numpy() - exact[:, :50].numpy()).max() > 0.1  # it is no copy


def gear_error(drive, **options):
    layer = begun(Gear(bits=2, buffer=16, **options), drive, 96)
    return float((layer.read(drive.queries).keys - drive.keys[:, :96]).norm())


@pytest.mark.parametrize("backbone", ["kcvt", "kivi"])
def test_the_error_of_gear_falls_with_rank_and_with_outliers(drive, backbone):
    by_rank = [gear_error(drive, rank=rank, outliers=0.0, backbone=backbone) for rank in (0, 1, 2, 4, 8, 16)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert by_rank[-1] < 0.01 * by_rank[0]
    by_outliers = [gear_error(drive, rank=0, outliers=share, backbone=backbone) for share in (0, 0.05, 0.2, 0.6, 1.0)]
    assert by_outliers == sorted(by_outliers, reverse=True)
    assert by_outliers[-1] < 0.02 * by_outliers[0]


# --- eviction


def h2o_by_hand(drive, prompt, end, budget, every, recent, sinks=0):
    """Return of each head the tokens that H2O keeps, and what attention gives behind the prompt."""
    kept = [list(range(prompt)) for _ in range(HEADS)]
    scores = [dict.fromkeys(range(end), 0.0) for _ in range(HEADS)]
    outputs = []

    def attend(at, visible):
        row = []
        for head in range(HEADS * GROUP):
            tokens = visible[head // GROUP]
            products = drive.keys[head // GROUP, tokens].half().double() @ drive.queries[head, at] / SIZE**0.5
            weights = products.softmax(0)
            for token, weight in zip(tokens, weights.tolist(), strict=True):
                scores[head // GROUP][token] += weight
            row.append(weights @ drive.values[head // GROUP, tokens])
        outputs.append(torch.stack(row))

    def evict():
        for head in range(HEADS):
            protected = set(kept[head][:sinks] + kept[head][len(kept[head]) - recent :])
            rest = sorted((t for t in kept[head] if t not in protected), key=lambda t: -scores[head][t])
            kept[head] = sorted(protected | set(rest[: budget - len(protected)]))

    for at in range(prompt):
        attend(at, [list(range(at + 1))] * HEADS)
    evict()
    for at in range(prompt, end):
        for head in range(HEADS):
            kept[head].append(at)
        attend(at, kept)
        if len(kept[0]) >= budget + every:
            evict()
    return kept, torch.stack(outputs[prompt:], 1) if end > prompt else None


def test_h2o_keeps_what_counting_by_hand_keeps(drive):
    layer = begun(H2O(budget=20, every=7, recent=0.5), drive, 60)
    found = drive.feed(layer, 60, 120)
    kept, expected = h2o_by_hand(drive, 60, 120, 20, 7, 10)
    assert layer.index.tolist() == kept
    assert torch.allclose(found, expected, atol=1e-6)
    assert kept[0] != kept[1]
    assert h2o_by_hand(drive, 60, 120, 20, 7, 5)[0] != kept


def test_streaming_gives_attention_with_positions_in_the_cache(drive):
    policy = Streaming(budget=20, every=5, sinks=4)
    layer = begun(policy, drive, 30)
    found = drive.feed(layer, 30, 90)
    kept = [*range(4), *range(14, 30)]
    for at in range(30, 90):
        kept.append(at)
        assert kept[:4] == [0, 1, 2, 3]
        places, halves = torch.arange(len(kept)), drive.keys.half().double()
        moved = drive.shape.rotate(halves[:, kept[4:]], (places[4:] - torch.tensor(kept[4:]))[None])
        keys = torch.cat([drive.shape.rotate(drive.raw[:, :4], places[None, :4]), moved], 1)
        # the query of token `at`, rotated by `at`, is moved to the last place
        query = drive.shape.rotate(drive.queries[:, at : at + 1], torch.tensor([[len(kept) - 1 - at]]))
        for head in range(HEADS * GROUP):
            weights = (keys[head // GROUP] @ query[head, 0] / SIZE**0.5).softmax(0)
            expected = weights @ drive.values[head // GROUP, kept]
            assert torch.allclose(found[head, at - 30], expected, atol=1e-9)
        if len(kept) == 25:
            kept = [*range(4), *kept[-16:]]
    assert layer.index[0].tolist() == kept


def test_snapkv_keeps_what_the_last_queries_look_at(drive):
    policy = SnapKV(budget=20, window=8, pool=3)
    layer = begun(policy, drive, 60)
    for head in range(HEADS):
        total = torch.zeros(60, dtype=torch.float64)
        for query in range(GROUP):
            for at in range(52, 60):
                products = drive.keys[head, : at + 1] @ drive.queries[head * GROUP + query, at] / SIZE**0.5
                total[: at + 1] += products.softmax(0)
        around = torch.nn.functional.pad(total, (1, 1))
        pooled = (around[:-2] + around[1:-1] + around[2:]) / 3
        best = sorted(range(52), key=lambda at: -float(pooled[at]))[:12]
        assert layer.index[head].tolist() == sorted([*best, *range(52, 60)])
    drive.feed(layer, 60, 100)
    assert layer.length == 60  # 20 of the prompt, and all 40 behind it


@pytest.mark.parametrize("merge", ["none", "v", "kv"])
@pytest.mark.parametrize("rope", ["before", "after"])
def test_d2o_merges_by_its_formulas(drive, merge, rope):
    policy = D2O(budget=20, every=5, recent=0.25, sinks=2, merge=merge, rope=rope, beta=0.6)
    prompt = drive.prompt(60)
    (layer,) = policy.begin([prompt])
    kept = h2o_by_hand(drive, 60, 60, 20, 5, 5, sinks=2)[0]
    assert layer.index.tolist() == kept
    stored = (drive.raw if rope == "before" else drive.keys.half().double())[:, :60]
    unit = stored / stored.norm(dim=-1, keepdim=True)
    threshold, pairs = [], []
    for head in range(HEADS):
        for evicted in [at for at in range(60) if at not in kept[head]]:
            similar = [float(unit[head, evicted] @ unit[head, other]) for other in kept[head]]
            threshold.append(max(similar))
            pairs.append((head, evicted, int(np.argmax(similar)), max(similar)))
    tau = np.mean(threshold)
    keys, values = stored.clone(), drive.values.clone()
    for head in range(HEADS):
        for place, token in enumerate(kept[head]):
            mine = [(t, math.exp(u)) for h, t, j, u in pairs if (h, j) == (head, place) and u >= tau]
            total = math.e + sum(weight for _, weight in mine)
            for rows, source, merged in ((keys, stored, merge == "kv"), (values, drive.values, merge != "none")):
                if merged:
                    mixed = math.e * source[head, token] + sum(weight * source[head, t] for t, weight in mine)
                    rows[head, token] = mixed / total
    seen = layer.read(drive.queries)
    positions = layer.index.long()
    expected = torch.stack([keys[head, kept[head]] for head in range(HEADS)])
    expected = drive.shape.rotate(expected, positions) if rope == "before" else expected
    assert torch.allclose(seen.keys, expected, atol=5e-3)
    assert torch.allclose(seen.values, torch.stack([values[h, kept[h]] for h in range(HEADS)]), atol=2e-3)
    plain = torch.stack([drive.values[h, kept[h]] for h in range(HEADS)])
    assert torch.allclose(seen.values, plain, atol=1e-6) == (merge == "none")
    if merge != "none":
        first = layer._threshold
        assert first == pytest.approx(tau, abs=1e-3)
        drive.feed(layer, 60, 65)
        assert layer._threshold != first


def test_the_threshold_of_d2o_is_a_running_mean(drive):
    layer = begun(D2O(budget=20, every=5, sinks=2, beta=0.0), drive, 60)
    first = layer._threshold
    drive.feed(layer, 60, 90)
    assert layer._threshold == first  # beta = 0 never moves it
    moving = begun(D2O(budget=20, every=5, sinks=2, beta=0.6), drive, 60)
    drive.feed(moving, 60, 90)
    assert moving._threshold != first


def prompts_of(shape, layers, tokens):
    return [Drive(shape, tokens, seed, spread=seed).prompt(tokens) for seed in range(layers)]


def test_budgets_of_layers_add_up_and_wide_attention_gets_more(drive):
    prompts = prompts_of(drive.shape, 4, 60)
    budgets = D2O(budget=20, every=5).budgets(prompts)
    assert sum(budgets) == 4 * 20
    assert len(set(budgets)) > 1
    variances = [float(prompt.scores.sum(0).var()) for prompt in prompts]
    assert sorted(range(4), key=lambda at: -budgets[at]) == sorted(range(4), key=lambda at: variances[at])
    layers = D2O(budget=20, every=5).begin(prompts)
    assert [layer.length for layer in layers] == budgets
    assert D2O(budget=20, every=5, layers="equal").budgets(prompts) == [20] * 4


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_divided_whole_and_within_its_limits(seed):
    random = np.random.default_rng(seed)
    layers, most = int(random.integers(1, 40)), int(random.integers(10, 2000))
    budget = int(random.integers(5, most + 1))
    shares = random.dirichlet(np.full(layers, 0.2)) + 1e-12
    parts = divided((shares / shares.sum()).tolist(), budget * layers, 5, most)
    assert sum(parts) == budget * layers
    assert min(parts) >= 5
    assert max(parts) <= most


@pytest.mark.parametrize(
    ("policy", "sinks", "recent"),
    [
        (H2O(budget=20, every=6), 0, 10),
        (D2O(budget=20, every=6, sinks=3), 3, 5),
        (D2O(budget=20, every=6, sinks=3, rope="after", merge="kv"), 3, 5),
        (Streaming(budget=20, every=6, sinks=3), 3, 17),
        (Window(budget=20, every=6), 0, 20),
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 15, 20, 50])
def test_sinks_and_the_last_tokens_stay_and_the_budget_holds(drive, policy, sinks, recent, prompt):
    layer = begun(policy, drive, prompt)
    for at in range(prompt, 120):
        drive.feed(layer, at, at + 1)
        for row in layer.index.tolist():
            assert row == sorted(set(row))
            assert set(range(min(sinks, at + 1))) <= set(row)
            assert set(range(max(0, at + 1 - recent), at + 1)) <= set(row)
        assert layer.length == min(at + 1, layer.length)
        assert 20 <= layer.length < 26 or at < 26
        assert 1 <= layer.room <= 26


class Forgetful(H2OLayer):
    def chosen(self):
        return torch.arange(self.budget).expand(HEADS, -1)


def test_a_policy_that_evicts_the_last_tokens_would_be_found(drive):
    layer = Forgetful(drive.prompt(50), 20, 6, 0.5)
    layer.evict()
    assert 49 not in layer.index[0].tolist()


# --- ShadowKV


def test_shadowkv_reads_the_chunks_whose_landmarks_a_query_likes(drive):
    policy = ShadowKV(rank=32, budget=16, chunk=8, outliers=2, local=1)
    layer = begun(policy, drive, 85)  # 9 chunks with landmarks, then 13 exact tokens
    drive.feed(layer, 85, 88)
    layer.append(drive.tokens(88, 89))
    queries = drive.queries[:, 88:89]
    seen = layer.read(queries)
    for head in range(HEADS):
        keys = drive.keys[head, :72].half().double().reshape(9, 8, SIZE)
        landmarks = keys.mean(1)
        cosines = [
            min(float(torch.cosine_similarity(key, landmark, dim=0)) for key in chunk)
            for chunk, landmark in zip(keys, landmarks, strict=True)
        ]
        outliers = sorted(range(9), key=lambda at: cosines[at])[:2]
        liked = torch.stack(
            [
                (landmarks.half().double() @ queries[head * GROUP + query, 0] / SIZE**0.5).softmax(0)
                for query in range(GROUP)
            ]
        ).amax(0)
        chosen = sorted((at for at in range(9) if at not in outliers), key=lambda at: -float(liked[at]))[:2]
        chunks = [*sorted(chosen), *sorted(outliers)]
        expected = [token for at in chunks for token in range(8 * at, 8 * at + 8)] + list(range(72, 89))
        assert seen.index[head].tolist() == expected
        assert torch.allclose(seen.values[head], drive.values[head, expected])
        assert torch.allclose(seen.keys[head], drive.keys[head, expected], atol=1e-2)
        assert torch.equal(seen.keys[head, 16:], drive.keys[head, expected[16:]].half().double())
    assert layer.moved == HEADS * 16 * SIZE * 2
    assert layer.room == 1


def test_the_error_of_shadowkv_falls_with_rank(drive):
    errors = []
    for rank in (1, 2, 4, 8, 16, 32):
        layer = begun(ShadowKV(rank=rank, budget=1000, outliers=0, local=0), drive, 96)
        errors.append(float((layer.read(drive.queries[:, :1]).keys - drive.keys[:, :96]).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


# --- bytes

HALF, NUMBER, FLOAT = 2, 4, 4
HEAD = SIZE * HALF  # a head's key or value in float16


def kivi_bytes(bits, blocks, new):
    codes = blocks * 64 * SIZE * bits // 8
    return HEADS * (2 * codes + blocks * 2 * SIZE * HALF + blocks * 64 * 2 * HALF + 2 * new * HEAD)


BYTES = {
    "f16": (POLICIES["f16"], HEADS * 150 * 2 * HEAD),
    "int8": (POLICIES["int8"], HEADS * 150 * 2 * (SIZE + 2 * HALF)),
    "hadamard": (POLICIES["hadamard"], HEADS * 150 * 2 * (SIZE // 2 + 2 * HALF)),
    "int4": (POLICIES["int4"], kivi_bytes(4, 2, 22)),
    "int5": (POLICIES["int5"], kivi_bytes(5, 2, 22)),
    "int2": (Kivi(2), kivi_bytes(2, 2, 22)),
    "int4 per token": (PerToken(4, 64), HEADS * 2 * (128 * (SIZE // 2 + 2 * HALF) + 22 * HEAD)),
    "window": (Window(budget=40, every=8), HEADS * 42 * 2 * HEAD + 42 * NUMBER),
    "streaming": (Streaming(budget=40, every=8), HEADS * (42 * 2 + 4) * HEAD + 42 * 2 * NUMBER),
    "h2o": (H2O(budget=40, every=8), HEADS * 42 * (2 * HEAD + NUMBER + FLOAT)),
    "d2o": (D2O(budget=40, every=8), HEADS * 42 * (2 * HEAD + 2 * NUMBER + FLOAT)),
    "snapkv": (SnapKV(budget=40), HEADS * 90 * (2 * HEAD + NUMBER)),
    # 96 tokens of the prompt, then 48 in chunks of 16, and 6 in the buffer
    "gear": (
        Gear(bits=4, rank=4, new_rank=2, outliers=0.05, buffer=16),
        sum(
            2 * HEADS * tokens * SIZE // 2  # codes
            + (HEADS * SIZE + tokens) * 2 * HALF  # scales and minimums, of channels' keys and tokens' values
            + (HEADS * SIZE * max(2, round(0.05 * tokens)) + tokens * 2) * 2 * HALF  # outliers and where they are
            + 2 * HEADS * rank * (tokens + SIZE) * HALF
            for tokens, rank in ((96, 4), (16, 2), (16, 2), (16, 2))
        )
        + 2 * HEADS * 6 * HEAD,
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_of_the_buffers_and_of_the_formula(drive, name):
    policy, expected = BYTES[name]
    layer = begun(policy, drive, 100)
    drive.feed(layer, 100, 150)
    assert memory([layer]).fast == expected
    assert memory([layer]).slow == 0
    assert memory([layer, layer]).fast == expected


def test_shadowkv_counts_fast_and_slow_memory_apart(drive):
    layer = begun(ShadowKV(rank=8, budget=16, outliers=2, local=4), drive, 100)  # 8 chunks, then 36 exact tokens
    drive.feed(layer, 100, 150)
    found = memory([layer])
    assert found.slow == HEADS * 64 * HEAD
    factors = (64 + HEADS * SIZE) * 8 * HALF + 64 * NUMBER
    landmarks, outliers = HEADS * 8 * HEAD, HEADS * 2 * (NUMBER + 8 * 2 * HEAD)
    assert found.fast == factors + landmarks + outliers + HEADS * 86 * 2 * HEAD


class Hoarder(LayerCache):
    """A policy that says it forgot, and keeps a view of everything."""

    def __init__(self, shape, rows):
        super().__init__(shape)
        self.keys = rows[:, -1:]

    def append(self, tokens):
        raise NotImplementedError

    def read(self, queries):
        return Read(self.keys, self.keys, torch.zeros(1, 1))


def test_a_view_counts_with_all_that_it_keeps_alive(drive):
    rows = torch.zeros(HEADS, 100, SIZE)
    assert memory([Hoarder(drive.shape, rows)]).fast == rows.nbytes


def test_compressing_policies_take_less_than_float16(drive):
    half = BYTES["f16"][1]
    assert BYTES["int4"][1] < 0.55 * half  # 22 of 150 tokens are in float16, and heads of 16 have large overheads
    assert all(expected < half for name, (_, expected) in BYTES.items() if name != "f16")
    assert isinstance(begun(D2O(budget=40), drive, 100), D2OLayer)
