"""The methods that round the weights of language models, each against the plain formula it stands for."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.importers.gguf_encode import BLOCK, Grid
from edgekit.passes.gptq import inverse_factor
from runtimes.llm.compression import scaling
from runtimes.llm.compression.forward import INPUTS, LayerEngine
from runtimes.llm.compression.guard import Budget, Quality, judge, kept_within, rolled_back
from runtimes.llm.compression.plan import of
from runtimes.llm.compression.quality import compare, layer_damages
from runtimes.llm.compression.quantise import in_format, quantised
from runtimes.llm.compression.rounding import FORMS, plain, rounded
from runtimes.llm.engine import Item
from runtimes.llm.torch_engine import TorchEngine

WINDOWS = [np.random.default_rng(seed).integers(0, 300, 48) for seed in range(3)]


def correlated(rows, features, seed=0):
    """(rows, features) inputs of which a few directions explain most, as activations are."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, features)) @ (
        rng.normal(size=(features, features)) * np.geomspace(3, 0.05, features)[:, None]
    )


# --- GPTQ


def surgeon(weight, second, form, damping):
    """Round one input after another, and each time move the others by the optimal brain surgeon's formula with the
    explicit inverse of what is left of the Hessian (Frantar et al. 2023, equation 2), in float64."""
    inputs = weight.shape[1]
    hessian = second + damping * np.mean(np.diag(second)) * np.eye(inputs)
    left, result = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for i in range(inputs):
        inverse = np.linalg.inv(hessian[i:, i:])
        if i % BLOCK == 0:
            cost = [1 / np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(i, i + BLOCK)]
            grid = Grid.fit(form, left[:, i : i + BLOCK], np.array(cost))
        column = left[:, i : i + 1]
        result[:, i : i + 1] = grid.values(grid.codes(column))
        left[:, i:] -= (column - result[:, i : i + 1]) @ inverse[:1] / inverse[0, 0]
    return result


@pytest.mark.parametrize("form", FORMS)
def test_gptq_is_the_optimal_brain_surgeon_column_by_column(form):
    weight = np.random.default_rng(1).normal(size=(20, 96)).astype(np.float32)
    x = correlated(300, 96)
    found = rounded("w", weight, form, inverse_factor(x.T @ x, 0.01)).values()
    assert np.abs(found - surgeon(weight, x.T @ x, form, 0.01)).max() < 1e-6
    elsewhere = surgeon(weight, np.eye(96), form, 0.01)
    assert np.abs(found - elsewhere).max() > 1e-3, "the inputs make no difference"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_gptq_loses_less_of_the_outputs_than_rounding_to_nearest(form, seed):
    weight, x = np.random.default_rng(seed).normal(size=(30, 96)).astype(np.float32), correlated(400, 96, seed)
    factors = (inverse_factor(x.T @ x, 0.01), None)
    losses = [((x @ (rounded("w", weight, form, factor).values() - weight).T) ** 2).sum() for factor in factors]
    assert losses[0] < 0.7 * losses[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e9])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_weights_that_no_format_can_hold_are_refused_with_their_name(bad, with_inputs):
    weight = np.ones((2, 32), np.float32)
    weight[1, 3] = bad
    with pytest.raises(EdgekitError, match=r"'blk\.7\.w'"):
        rounded("blk.7.w", weight, "Q4_0", np.eye(32) if with_inputs else None)


# --- scaling


def in_float32(layer):
    return {role: tensor.values() for role, tensor in of(layer).items()}


def moments_of(model, engine):
    found = {}
    engine.run_layer(0, model.layers[0], engine.begun(WINDOWS), found)
    return found


def with_outliers(model):
    """The model with norms that make some inputs large, as trained ones do."""
    layers, sizes = [], np.random.default_rng(0).permutation(np.geomspace(0.1, 10, model.architecture.width))
    for layer in model.layers:
        names = ("attention_norm", "mlp_norm")
        norms = {name: getattr(layer, name).values() * sizes for name in names}
        layers.append(
            replace(layer, **{name: plain(getattr(layer, name).name, value) for name, value in norms.items()})
        )
    return replace(model, layers=layers)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_scales_change_nothing_before_rounding(toy, family, monkeypatch):
    model = with_outliers(toy(family, "F32"))
    before = TorchEngine(model, dtype="float64").step([Item(0, WINDOWS[0], logits="all")])[0]
    moments = moments_of(model, LayerEngine(model, 48))
    weights, scaled_moments = scaling.scaled(in_float32(model.layers[0]), moments, "Q4_0", model.architecture)

    def logits(of_first_layer):
        layer = replace(
            model.layers[0],
            **{role: plain(of(model.layers[0])[role].name, value) for role, value in of_first_layer.items()},
        )
        changed = replace(model, layers=[layer, *model.layers[1:]])
        found = TorchEngine(changed, dtype="float64").step([Item(0, WINDOWS[0], logits="all")])[0]
        return found, moments_of(changed, LayerEngine(changed, 48))

    found, measured = logits(weights)
    assert np.abs(found - before).max() < 1e-4 * np.abs(before).max()
    for group, roles in INPUTS.items():
        assert torch.allclose(
            scaled_moments[group], measured[group], rtol=1e-3, atol=1e-3 * measured[group].abs().max()
        )
        for role in roles:
            assert not np.allclose(weights[role], of(model.layers[0])[role].values()), f"{role} has no scale"
    # scales that are not folded into what makes the inputs do change it
    for group, sources in scaling.SOURCES.items():
        missing = {role: of(model.layers[0])[role].values() for role in sources if role in weights}
        assert np.abs(logits(weights | missing)[0] - before).max() > 1e-2 * np.abs(before).max(), group


@pytest.mark.parametrize(("group", "norm"), [("query", "attention_norm"), ("gate", "mlp_norm")])
def test_scaling_loses_less_of_the_outputs_where_some_inputs_are_large(toy, group, norm):
    model = with_outliers(toy("llama", "F32"))
    moments = moments_of(model, LayerEngine(model, 48))

    def loss(method):
        """The squared errors of the outputs of all matrices that have this input."""
        layer = quantised(model.layers[0], "Q4_0", method, moments, model.architecture, 0.01)
        scale = getattr(model.layers[0], norm).values() / getattr(layer, norm).values()
        found = 0.0
        for role in set(INPUTS[group]) - {"up", "value"}:  # whose rows have a scale, too
            error = getattr(layer, role).values() / scale - getattr(model.layers[0], role).values()
            found += float(((error @ moments[group].numpy()) * error).sum())
        return found

    losses = {method: loss(method) for method in ("nearest", "awq", "gptq", "awq+gptq")}
    assert losses["awq"] < 0.8 * losses["nearest"], losses
    assert losses["gptq"] < 0.8 * losses["nearest"], losses
    assert losses["awq+gptq"] < 0.8 * losses["awq"], losses


# --- layer by layer


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_layer_by_layer_is_the_whole_model_and_one_layer_is_decoded_at_once(toy, family, monkeypatch):
    model = toy(family, "Q8_0", tied=False)
    expected = [TorchEngine(model).step([Item(0, ids, logits="all")])[0] for ids in WINDOWS]
    engine, decoded = LayerEngine(model, 48), []
    run_layers = engine.run_layers

    def counted(*arguments):
        decoded.append(sum(bool(layer) for layer in engine._layers))
        return run_layers(*arguments)

    monkeypatch.setattr(engine, "run_layers", counted)
    windows = engine.begun(WINDOWS)
    for number, layer in enumerate(model.layers):
        engine.run_layer(number, layer, windows)
    for window, logits in zip(windows, expected, strict=True):
        found = torch.cat([rows for _, rows in engine.log_probabilities(window)])
        assert torch.allclose(found, torch.from_numpy(logits).double().log_softmax(-1), atol=1e-5)
    assert set(decoded) == {1}
    assert not any(engine._layers)


def test_moments_are_those_of_the_inputs(toy):
    model = toy("llama", "F32")
    moments = moments_of(model, LayerEngine(model, 48))
    rows = model.embedding.values().astype(np.float64)[np.concatenate(WINDOWS)]
    epsilon = model.architecture.epsilon
    rows /= np.sqrt((rows**2).mean(-1, keepdims=True) + epsilon)
    rows *= model.layers[0].attention_norm.values()
    assert np.allclose(moments["query"].numpy(), rows.T @ rows, rtol=1e-4, atol=1e-3)
    assert {name: len(value) for name, value in moments.items()} == {
        "query": 64, "attention_output": 128, "gate": 64, "down": 96,
    }  # fmt: skip


def ends(engine, layers):
    windows = engine.begun(WINDOWS)
    for number, layer in enumerate(layers):
        engine.run_layer(number, layer, windows)
    return engine, windows


def test_quality_is_that_of_the_plain_formulas(toy):
    model = toy("llama", "F32")
    engine = LayerEngine(model, 48)
    layers = [in_format(layer, "Q4_0") for layer in model.layers]
    quality = compare(ends(engine, model.layers), ends(engine, layers))
    logs = []
    for found in (model, replace(model, layers=layers)):
        logits = [TorchEngine(found, dtype="float64").step([Item(0, ids, logits="all")])[0] for ids in WINDOWS]
        logs.append(
            [row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum(-1, keepdims=True)) for row in logits]
        )
    p, q = (np.concatenate(part) for part in logs)
    assert quality.divergence.value == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-4)
    assert quality.divergence.value > 1e-4
    assert quality.agreement.value == (p.argmax(-1) == q.argmax(-1)).mean()
    losses = [
        -np.concatenate([log[np.arange(47), ids[1:]] for log, ids in zip(part, WINDOWS, strict=True)]).mean()
        for part in logs
    ]
    assert quality.source_perplexity == pytest.approx(np.exp(losses[0]), rel=1e-4)
    assert quality.perplexity.value == pytest.approx(np.exp(losses[1] - losses[0]) - 1, abs=1e-5)
    assert quality.divergence.low < quality.divergence.value < quality.divergence.high
    same = compare(ends(engine, model.layers), ends(engine, model.layers))
    assert (same.divergence.value, same.perplexity.value, same.agreement.value) == (0, 0, 1)


def test_the_damage_of_a_layer_is_that_of_the_model_with_this_layer_alone(toy):
    model = toy("llama", "F32", layers=3)
    candidates = [in_format(layer, "Q4_0") for layer in model.layers]
    engine = LayerEngine(model, 48)
    found = layer_damages(engine, model.layers, lambda number: candidates[number], WINDOWS)
    for number, damage in enumerate(found):
        layers = [*model.layers]
        layers[number] = candidates[number]
        expected = compare(ends(engine, model.layers), ends(engine, layers)).divergence.value
        assert damage == pytest.approx(expected, rel=1e-6)
    assert len({round(damage, 9) for damage in found}) == 3


# --- the guard


def quality(divergence, perplexity=0.0, agreement=1.0):
    from edgekit.compression.metrics import Measurement

    def measured(value):
        return Measurement(value, value, value, 100)

    return Quality(measured(divergence), measured(perplexity), measured(agreement), 10.0)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            quality(0.11),
            r"diverges from the source by 0.1100 \[0.1100, 0.1100\] nats per token, 0.1 allowed \(n = 100\)",
        ),
        (quality(0.0, 0.06), "raises the perplexity by 6.00%"),
        (quality(0.0, 0.0, 0.8), "agrees with the source on 80.0%"),
        (quality(float("nan")), "not a number"),
    ],
)
def test_each_limit_is_kept(found, text):
    import re

    verdict = judge(found, Budget())
    assert not verdict.kept
    assert re.search(text, verdict.reason)
    assert judge(quality(0.1, 0.05, 0.85), Budget()).kept


@pytest.mark.parametrize("layers", [1, 2, 7])
@pytest.mark.parametrize("fallbacks", [("Q8_0", "source"), ("source",)])
def test_the_fewest_layers_are_rolled_back_the_most_damaged_first(layers, fallbacks):
    damages = np.random.default_rng(layers).permutation(layers).astype(float)
    order = np.argsort(-damages).tolist()
    formats = ["Q4_0"] * layers
    for needed in range(1, layers * len(fallbacks) + 1):
        enough = [rolled_back(formats, fallbacks, order, steps) for steps in range(needed, layers * len(fallbacks) + 1)]
        measured = []

        def measure(now, enough=enough, measured=measured):
            measured.append(now)
            return quality(0.01 if now in enough else 0.2)

        outcome = kept_within(Budget(), quality(0.3), formats, fallbacks, lambda: damages, measure)
        assert outcome.formats == enough[0]
        assert outcome.quality.divergence.value == 0.01
        assert outcome.formats in measured
        changed = [number for number in range(layers) if outcome.formats[number] != "Q4_0"]
        assert [*outcome.reasons] == [number for number in order if number in changed]
        assert all("0.3000" in reason for reason in outcome.reasons.values())


def test_a_model_within_its_budget_costs_no_further_measurement():
    def never(*_):
        raise AssertionError

    assert kept_within(Budget(), quality(0.05), ["Q4_0"], ("source",), never, never).formats == ["Q4_0"]


def test_a_budget_that_nothing_can_meet_is_an_error():
    with pytest.raises(EdgekitError, match="with all layers rolled back the model diverges"):
        kept_within(Budget(0.0), quality(0.3), ["Q4_0"] * 3, ("source",), lambda: [1, 2, 3], lambda now: quality(0.2))


@pytest.mark.parametrize("values", [(-1, 0, 0), (0, float("nan"), 0), (0, 0, 1.1)])
def test_budgets_without_meaning_are_refused(values):
    with pytest.raises(EdgekitError, match="budget of"):
        Budget(*values)
