"""t2: parity with the published models, and with a forward pass written from the paper in float64 numpy."""

import numpy as np
import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.nn import t2
from edgekit.nn.t2 import T2, T2Config, build, positional_encoding, prunable_groups
from edgekit.nn.t2_weights import from_published

PUBLISHED = (
    "t2_GR_noZ", "t2_UGRIZY_noZ", "t2_UGRIZY_wZ", "tinho_GR_noZ", "tinho_GR_noZ_pruned", "tinho_UGRIZY_wZ",
    "tinho_UGRIZY_wZ_pruned",
)  # fmt: skip
TOLERANCE = 3e-5  # of a probability


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def numpy_t2(weights, light_curve, context=None, *, heads: int, layers: int = 1):
    """(batch, classes) logits in float64, from the paper and facts about the published code; shares nothing with T2."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = light_curve.astype(np.float64)
    bands = x.shape[2]

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, value):
        value = value - value.mean(axis=-1, keepdims=True)
        value = value / np.sqrt((value**2).mean(axis=-1, keepdims=True) + 1e-6)
        return value * w[f"{name}.weight"] + w[f"{name}.bias"]

    if context is not None:
        steps = np.stack([np.tile(row, bands).reshape(-1, bands) for row in context])
        x = np.concatenate([x, steps], axis=1)
    tokens, dim = x.shape[1], w["embed.weight"].shape[0]
    place = np.arange(tokens)[:, None] / 10000.0 ** (2 * (np.arange(dim) // 2) / dim)
    x = np.maximum(linear("embed", x), 0) + np.where(np.arange(dim) % 2 == 0, np.sin(place), np.cos(place))
    for number in range(layers):
        block = f"blocks.{number}."
        q, k, v = (linear(f"{block}attention.{part}", x) for part in ("query", "key", "value"))
        mixed = []
        for part in range(heads):
            cut = slice(part * q.shape[2] // heads, (part + 1) * q.shape[2] // heads)
            scores = q[..., cut] @ k[..., cut].transpose(0, 2, 1) / np.sqrt(q[..., cut].shape[2])
            mixed.append(softmax(scores) @ v[..., cut])
        x = norm(f"{block}norm1", x + linear(f"{block}attention.combine", np.concatenate(mixed, axis=2)))
        x = norm(f"{block}norm2", x + linear(f"{block}contract", np.maximum(linear(f"{block}expand", x), 0)))
    return linear("classifier", x.mean(axis=1))


def logits(model, *arrays):
    with torch.no_grad():
        return model(*map(torch.from_numpy, arrays)).numpy()


@pytest.fixture(params=["compiled attention", "plain operators"])
def attention(request, monkeypatch):
    """Select each of t2's two ways to compute attention: the fast one, and the one for export."""
    if request.param == "plain operators":
        monkeypatch.setattr(t2, "_compiled_attention_fits", lambda x: False)
    return request.param


@pytest.fixture(scope="module")
def published(shared_data):
    """Return published(name), which returns a set of published weights, the inputs, and the probabilities of the
    original model."""
    folder = shared_data / "t2_reference"
    reference = np.load(folder / "reference_io.npz")

    def load(name):
        inputs = [reference["inputs_gr" if "GR" in name.split("_") else "inputs_ugrizy"]]
        inputs += [reference["inputs_z"]] if name.split("_")[2] == "wZ" else []
        return dict(np.load(folder / f"weights_{name}.npz")), inputs, reference[f"probs_{name}"]

    return load


@pytest.mark.realdata
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_probabilities_are_reproduced(name, attention, published):
    arrays, inputs, expected = published(name)
    assert len(expected) == 256
    model = from_published(arrays, context=2 * (len(inputs) == 2))
    assert np.abs(softmax(logits(model, *inputs)) - expected).max() < TOLERANCE


@pytest.mark.realdata
@pytest.mark.parametrize("kernel", ["att.query", "att.combine"])
def test_a_transposed_kernel_fails_that_test(kernel, published):
    arrays, inputs, expected = published("t2_GR_noZ")
    arrays[f"{kernel}.kernel"] = np.ascontiguousarray(arrays[f"{kernel}.kernel"].T)
    gap = np.abs(softmax(logits(from_published(arrays, context=0), *inputs)) - expected).max()
    assert gap > 100 * TOLERANCE


@pytest.mark.realdata
def test_redshift_that_is_repeated_instead_of_tiled_fails_that_test(published):
    arrays, (light_curve, redshift), expected = published("t2_UGRIZY_wZ")
    model = from_published(arrays, context=2)
    gaps = []
    for steps in (np.tile(redshift, 6), np.repeat(redshift, 6, axis=1)):  # z e z e ..., then z z ... e e
        longer = np.concatenate([light_curve, steps.reshape(-1, 2, 6)], axis=1)
        gaps.append(np.abs(softmax(logits(model, longer)) - expected).max())
    assert gaps[0] < TOLERANCE
    assert gaps[1] > 100 * TOLERANCE


CONFIGS = {
    "as published": {"bands": 2, "classes": 5, "sequence": 30, "embed_dim": 32, "heads": 16, "ff_dim": 40},
    "deep": {
        "bands": 3,
        "classes": 4,
        "sequence": 9,
        "embed_dim": 12,
        "heads": 3,
        "head_dim": 4,
        "ff_dim": 7,
        "layers": 3,
    },
    "pruned heads": {"bands": 2, "classes": 3, "sequence": 11, "embed_dim": 16, "heads": 3, "head_dim": 2, "ff_dim": 5},
    "context": {"bands": 6, "classes": 14, "sequence": 10, "embed_dim": 8, "heads": 2, "head_dim": 4, "context": 2},
    "odd width": {"bands": 1, "classes": 2, "sequence": 1, "embed_dim": 7, "heads": 1, "head_dim": 1, "context": 3},
}


@pytest.mark.parametrize("arguments", CONFIGS.values(), ids=CONFIGS)
def test_forward_agrees_with_numpy(arguments, attention):
    torch.manual_seed(1)
    model = build(**arguments).eval()
    for parameter in model.parameters():  # norms start at one and biases near zero, which would hide their misuse
        parameter.data += 0.3 * torch.randn_like(parameter)
    rng = np.random.default_rng(2)
    inputs = [rng.normal(size=(6, arguments["sequence"], arguments["bands"])).astype(np.float32)]
    if "context" in arguments:
        inputs.append(rng.normal(size=(6, arguments["context"])).astype(np.float32))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    sizes = {"heads": arguments["heads"], "layers": arguments.get("layers", 1)}
    expected = numpy_t2(weights, *inputs, **sizes)
    assert np.abs(logits(model, *inputs) - expected).max() < 2e-5 * max(1, np.abs(expected).max())
    # the planted failures: another head count for the same weights, a norm without its bias
    if arguments["heads"] % 3 == 0:
        assert np.abs(numpy_t2(weights, *inputs, **sizes | {"heads": 1}) - expected).max() > 1e-3
    broken = weights | {"blocks.0.norm1.bias": 0 * weights["blocks.0.norm1.bias"]}
    assert np.abs(numpy_t2(broken, *inputs, **sizes) - expected).max() > 1e-3


def test_training_gradients_agree_between_the_two_attentions(monkeypatch):
    torch.manual_seed(0)
    model = build(bands=2, classes=3, sequence=20, embed_dim=8, heads=4, head_dim=2, ff_dim=8).eval()
    x = torch.randn(5, 20, 2)
    gradients = []
    for fits in (True, False):
        monkeypatch.setattr(t2, "_compiled_attention_fits", lambda x, fits=fits: fits)
        loss = torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for name, first, second in zip(dict(model.named_parameters()), *gradients, strict=True):
        assert torch.allclose(first, second, rtol=1e-3, atol=1e-6), name


def test_the_compiled_attention_is_used_when_it_fits_and_only_then():
    x = torch.zeros(1, 2, 2)
    assert t2._compiled_attention_fits(x)
    assert not t2._compiled_attention_fits(x.double())
    assert not t2._compiled_attention_fits(x.to("meta"))


def test_positional_encoding_to_the_last_bit():
    expected = np.empty((102, 32))
    for position in range(102):
        for column in range(32):
            angle = position / 10000 ** (2 * (column // 2) / 32)
            expected[position, column] = np.cos(angle) if column % 2 else np.sin(angle)
    assert np.abs(positional_encoding(102, 32).numpy() - expected).max() < 1e-7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bands": 0}, "bands = 0"),
        ({"bands": 2, "heads": -1}, "heads = -1"),
        ({"bands": 2, "dropout": 1.0}, "dropout"),
        ({"bands": "two"}, "bands = 'two'"),
        ({"bands": 2.5}, "t2"),
        ({"bands": 2, "tails": 1}, "tails"),
        ({}, "bands"),
    ],
)
def test_bad_arguments_are_errors_that_name_them(arguments, words):
    with pytest.raises(EdgekitError, match=words):
        build(**arguments)


def test_prunable_groups_name_parameters_that_exist_with_the_sizes_they_say():
    model = T2(T2Config(bands=2, embed_dim=8, heads=3, head_dim=2, ff_dim=10, layers=2))
    state = model.state_dict()
    groups = prunable_groups(model)
    assert [(group.argument, group.size, group.width) for group in groups] == [("heads", 3, 2), ("ff_dim", 10, 1)] * 2
    for group in groups:
        assert {state[name].shape[0] for name in group.rows} == {group.size * group.width}
        assert {state[name].shape[1] for name in group.columns} == {group.size * group.width}
        assert model.get_submodule(group.consumer).in_features == group.size * group.width


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": 10**9},
        {"layers": 1001},
        {"embed_dim": 10**6, "ff_dim": 10**6},
        {"sequence": 10**12},
        {"classes": 10**18},
        {"context": 10**12},
        {"heads": 10**9},
    ],
)
def test_a_network_that_is_too_large_is_refused_before_it_is_built(arguments):
    with pytest.raises(EdgekitError, match="edgekit builds up to 1,000 layers and 268,435,456 numbers"):
        build(**{"bands": 2, **arguments})


@pytest.mark.parametrize("value", [1.5, True, "2", None, [2], float("nan")])
def test_a_count_that_is_no_whole_number_is_refused(value):
    with pytest.raises(EdgekitError):
        build(bands=2, layers=value)


@pytest.mark.parametrize("value", [-0.1, 1, float("nan"), "0.1", True])
def test_a_dropout_that_is_none_is_refused(value):
    with pytest.raises(EdgekitError, match="dropout"):
        build(bands=2, dropout=value)
