"""Every policy of the key-value cache in the torch engine: exact limits, schedules, and the engine's features."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.importers.gguf import read_gguf
from runtimes.llm.architecture import from_gguf
from runtimes.llm.engine import Item, Saved
from runtimes.llm.kv.d2o import D2O
from runtimes.llm.kv.gear import Gear
from runtimes.llm.kv.h2o import H2O
from runtimes.llm.kv.kivi import Kivi
from runtimes.llm.kv.per_token import PerToken
from runtimes.llm.kv.policies import POLICIES, policy
from runtimes.llm.kv.shadowkv import ShadowKV
from runtimes.llm.kv.snapkv import SnapKV
from runtimes.llm.kv.streaming import Streaming
from runtimes.llm.kv.window import Window
from runtimes.llm.native_engine import NativeEngine
from runtimes.llm.request import Request
from runtimes.llm.sampling import Sampling
from runtimes.llm.scheduler import Scheduler
from runtimes.llm.torch_engine import TorchEngine
from tests.gguf_files import toy_model
from tests.runtimes.llm.conftest import compiler
from tests.runtimes.llm.kivi import KiviEngine

IDS = np.random.default_rng(3).integers(0, 300, 190)
PROMPT = 90
# with parameters at which every policy compresses within these tokens
SMALL = {
    **{name: POLICIES[name] for name in ("f16", "int8", "int4", "int5", "hadamard")},
    "per token": PerToken(4, 16),
    "gear": Gear(buffer=16),
    "gear on kivi": Gear(bits=2, buffer=16, backbone="kivi"),
    "h2o": H2O(budget=40, every=8),
    "streaming": Streaming(budget=40, every=8),
    "window": Window(budget=40, every=8),
    "snapkv": SnapKV(budget=40, window=16),
    "d2o": D2O(budget=40, every=8),
    "d2o after": D2O(budget=40, every=8, merge="kv", rope="after"),
    "shadowkv": ShadowKV(rank=16, budget=24, outliers=2, local=2),
}
each = pytest.mark.parametrize("name", SMALL)


def engine_of(model, kv="full", **options):
    return TorchEngine(model, blocks=80, kv=kv, **{"dtype": "float64", **options})


def run(engine, sequence=0, prompt=PROMPT, chunk=1000, ids=IDS):
    """Return (tokens, vocabulary) logits from the prompt's last token on."""
    for at in range(0, prompt - 1, chunk):
        engine.step([Item(sequence, ids[at : min(at + chunk, prompt - 1)], logits="none")])
    found = [engine.step([Item(sequence, ids[prompt - 1 : prompt])])[0]]
    for at in range(prompt, len(ids), chunk):
        found.append(engine.step([Item(sequence, ids[at : at + chunk], logits="all")])[0])
    return np.concatenate(found)


def away(found, expected):
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return from_gguf(read_gguf(toy_model(folder, "llama", "F32", head_size=16, heads=4, kv_heads=2, layers=3)))


@pytest.fixture(scope="module")
def exact(model):
    return run(engine_of(model))


@pytest.fixture(scope="module")
def halves(model):
    """Of the float16 cache, a token at a time."""
    found = run(engine_of(model, "f16"), chunk=1)
    assert not np.array_equal(run(engine_of(model, SMALL["h2o"]), chunk=1), found)  # another cache gives other bits
    return found


# --- limits


@each
def test_it_does_not_depend_on_how_a_sequence_is_cut_into_steps(model, exact, name):
    expected = run(engine_of(model, SMALL[name]))
    for chunk in (1, 17):
        assert away(run(engine_of(model, SMALL[name]), chunk=chunk), expected) < 1e-5
    assert away(expected, exact) > (1e-6 if name == "f16" else 1e-4)  # it is not the exact cache that was compared
    assert away(run(engine_of(model, SMALL[name]), prompt=PROMPT - 20)[20:], expected) > 1e-4 or SMALL[name].streams


@pytest.mark.parametrize(
    "kv",
    [
        H2O(budget=190, every=8),
        Streaming(budget=190, every=8),
        Window(budget=190, every=8),
        SnapKV(budget=190),
        D2O(budget=190, every=8, rope="after", merge="kv"),
        ShadowKV(local=1000),
    ],
    ids=str,
)
def test_a_budget_of_all_tokens_gives_the_bits_of_float16(model, halves, kv):
    assert np.array_equal(run(engine_of(model, kv), chunk=1), halves)


@pytest.mark.parametrize(
    ("kv", "most"),
    [
        (POLICIES["f16"], 1e-3),
        (Gear(outliers=1.0, buffer=16), 1e-3),
        (Gear(bits=2, rank=16, new_rank=16, buffer=16), 2e-3),
        (Gear(bits=2, rank=16, new_rank=16, outliers=0, buffer=16, backbone="kivi"), 2e-3),
        (ShadowKV(rank=32, budget=190, outliers=0, local=0), 2e-3),
        (ShadowKV(rank=32, budget=190, outliers=5, local=3), 2e-3),
        (D2O(budget=190), 1e-3),
    ],
    ids=str,
)
def test_full_rank_all_outliers_and_all_tokens_are_exact_up_to_float16(model, exact, kv, most):
    assert away(run(engine_of(model, kv)), exact) < most
    assert away(run(engine_of(model, SMALL["gear on kivi"])), exact) > 5 * most


def test_all_outliers_give_the_bits_of_float16(model, halves):
    found = run(engine_of(model, Gear(outliers=1.0, rank=0, new_rank=0, buffer=16)), chunk=1)
    assert np.array_equal(found, halves)


def test_float16_equals_attention_over_rounded_keys_and_values(model):
    class Halves(TorchEngine):
        def _attend(self, queries, keys, values, index, window=0):
            return super()._attend(queries, keys.half().double(), values.half().double(), index, window)

    expected = run(Halves(model, blocks=80, dtype="float64"))
    assert away(run(engine_of(model, "f16")), expected) < 1e-9


def test_int4_is_the_reference_by_the_formulas_of_kivi(model):
    expected = run(KiviEngine(model, blocks=80, dtype="float64"))
    assert away(run(engine_of(model, "int4")), expected) < 1e-9
    assert away(run(engine_of(model, "int5")), expected) > 1e-3


@compiler
@pytest.mark.parametrize(("kv", "other"), [("int4", "int5"), ("int8", "int4"), ("f16", "int4")])
def test_the_native_engine_computes_what_these_policies_say(model, kv, other):
    expected = run(engine_of(model, kv))
    with closing(NativeEngine(model, blocks=16, kv=kv, threads=1)) as engine:
        found = run(engine)
    distance = np.abs(found - expected).mean() / np.abs(expected).max()
    assert distance < 0.01  # activations of 8 bits
    assert np.abs(run(engine_of(model, other)) - expected).mean() / np.abs(expected).max() > distance / 2


def test_a_sliding_window_of_one_step_is_attention_with_a_mask(model):
    class Masked(TorchEngine):
        def _attend(self, queries, keys, values, index, window=0):
            first = [max(0, at + 1 - 24) for at in index.tolist()]
            rows = [
                super(Masked, self)._attend(
                    queries[row : row + 1], keys[at : end + 1].half().double(), values[at : end + 1].half().double(),
                    torch.tensor([end - at]),
                )
                for row, (at, end) in enumerate(zip(first, index.tolist(), strict=True))
            ]  # fmt: skip
            return torch.cat(rows)

    expected = run(Masked(model, blocks=80, dtype="float64"), prompt=1)
    # `budget` tokens before the new one
    assert away(run(engine_of(model, Window(budget=23, every=1)), prompt=1), expected) < 1e-9
    assert away(run(engine_of(model, Window(budget=24, every=1)), prompt=1), expected) > 1e-3


# --- what the engine does with a sequence


@each
def test_the_last_step_is_taken_back_and_an_earlier_one_costs_the_sequence(model, name):
    engine = engine_of(model, SMALL[name])
    expected = run(engine, chunk=50)
    assert engine.truncate(0, 190) == 190
    assert engine.truncate(0, 150) == 140  # the last step had 50 tokens
    assert engine.length(0) == 140
    assert away(engine.step([Item(0, IDS[140:], logits="all")])[0], expected[-50:]) < 1e-9
    engine.step([Item(0, IDS[:1])])
    assert engine.truncate(0, 100) == 0
    assert away(run(engine, chunk=50), expected) < 1e-9
    with pytest.raises(EdgekitError, match="cannot be cut to 300"):
        engine.truncate(0, 300)


@each
def test_a_fork_and_its_parent_do_not_change_each_other(model, name):
    engine = engine_of(model, SMALL[name])
    expected = run(engine_of(model, SMALL[name]))
    run(engine, ids=IDS[:130])
    engine.fork(0, 1)
    run(engine, sequence=1, ids=IDS[::-1][:40], prompt=20)
    for sequence in (0, 0):
        found = engine.step([Item(sequence, IDS[130:], logits="all")])[0]
        assert away(found, expected[-60:]) < 1e-9
        engine.truncate(0, 130)
    engine.remove(1)
    engine.remove(0)
    assert engine.blocks.free == engine.blocks.number
    assert not engine._cached
    assert not engine._before


@each
def test_a_step_that_is_given_up_changes_nothing(model, name):
    engine = engine_of(model, SMALL[name])
    expected = run(engine_of(model, SMALL[name]))
    run(engine, ids=IDS[:130])
    given_up = engine.start([Item(0, IDS[:40])])
    given_up.advance(2)
    assert away(engine.step([Item(0, IDS[130:], logits="all")])[0], expected[-60:]) < 1e-9


@each
def test_two_sequences_share_a_step(model, name):
    engine = engine_of(model, SMALL[name])
    expected = run(engine_of(model, SMALL[name]))
    run(engine, ids=IDS[:130])
    both = engine.step([Item(5, IDS[:20]), Item(0, IDS[130:], logits="all")])
    assert away(both[1], expected[-60:]) < 1e-9


def test_what_a_policy_cannot_do_is_refused_or_not_done(model):
    engine = engine_of(model, SMALL["h2o"])
    run(engine)
    with pytest.raises(EdgekitError, match=r"H2O\(budget=40.*cannot be saved or restored; fork it"):
        engine.save(0)
    with pytest.raises(EdgekitError, match="cannot be saved or restored"):
        engine.restore(1, Saved((), np.empty(0)))
    assert engine.reuse(1, IDS) == 0
    full = engine_of(model)
    run(full)
    assert full.reuse(1, IDS) > 0


@pytest.mark.parametrize("name", ["int4", "h2o", "gear", "shadowkv", "d2o"])
def test_drafts_change_no_token(model, name):
    ids = np.tile(np.arange(10, 22), 6)
    found, drafted = [], []
    for drafts in (0, 8):
        scheduler = Scheduler(engine_of(model, SMALL[name]), budget=40, clock=iter(np.arange(1e6)).__next__)
        scheduler.submit(Request(ids, 40, Sampling(), frozenset(), drafts=drafts))
        found.append([item.token for item in scheduler if item.token is not None])
        drafted.append(scheduler.drafted)
    assert found[0] == found[1]
    assert len(found[0]) == 40
    assert drafted[0] == 0 < drafted[1]


# --- options


def test_a_policy_is_named_with_its_options():
    assert policy("full") is None
    assert policy("h2o:budget=7,recent=0.25") == H2O(budget=7, recent=0.25)
    assert policy("d2o:merge=none") == D2O(merge="none")
    assert policy("int4:bits=3") == Kivi(3)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("h20", "unknown key-value cache of the torch engine 'h20'; .*did you mean 'h2o'"),
        ("full:budget=3", "unknown key-value cache"),
        ("h2o:budgets=3", "unknown option of the kv policy h2o 'budgets'.*did you mean 'budget'"),
        ("f16:bits=3", "unknown option of the kv policy f16 'bits'.*no options"),
        ("h2o:budget=many", "budget = 'many'; expected a whole number"),
        ("h2o:recent=", "recent = ''; expected a number"),
        ("h2o:budget=0", "H2O: budget = 0; expected at least 1"),
        ("h2o:recent=2", "recent = 2.0; expected 0 to 1"),
        ("int8:bits=9", "PerToken: bits = 9; expected 1 to 8"),
        ("gear:backbone=x", "unknown backbone 'x' in kv policy Gear"),
        ("gear:buffer=0", "Gear: buffer = 0"),
        ("d2o:merge=x", "unknown merge 'x'"),
        ("d2o:budget=3", "4 sinks of a budget of 3"),
        ("streaming:budget=4", "4 sinks of a budget of 4"),
        ("snapkv:budget=8", "SnapKV: window = 32; expected 1 to 8"),
        ("snapkv:pool=4", "pool = 4; expected an odd number"),
        ("shadowkv:rank=0", "ShadowKV: rank = 0"),
    ],
)
def test_wrong_policies_and_options_are_named(model, text, problem):
    with pytest.raises(EdgekitError, match=problem):
        engine_of(model, text)


def test_heads_that_a_policy_cannot_store_are_named(tmp_path):
    odd = from_gguf(read_gguf(toy_model(tmp_path, "llama", "F32", head_size=12, heads=8, kv_heads=2)))
    for kv, problem in (
        ("hadamard", "head size is 12; expected a power of 2"),
        ("int5", "head size is 12; codes of 5"),
    ):
        with pytest.raises(EdgekitError, match=problem):
            engine_of(odd, kv)
    assert run(engine_of(odd, "int4")).shape == (101, 307)


@compiler
def test_the_native_engine_names_the_torch_engine_for_other_policies(model):
    with pytest.raises(EdgekitError, match=r"'gear' in the native engine; expected one of: f16, int8, int4; .*torch"):
        NativeEngine(model, kv="gear")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"windows": (8, 0)}, "layers that see a window of tokens"),
        ({"score_cap": 50.0}, "scores with a cap"),
        ({"query_scale": 0.01}, "a query scale of 0.01"),
    ],
)
def test_a_policy_refuses_attention_that_it_does_not_compute(model, changes, what):
    other = replace(model, architecture=replace(model.architecture, **changes))
    with pytest.raises(EdgekitError, match=f"has {what}; expected plain attention, or kv=full"):
        TorchEngine(other, blocks=4, kv="int4")
    TorchEngine(other, blocks=4).close()
