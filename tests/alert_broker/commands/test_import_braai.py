"""edgekit import-braai: the published weights give the scores in ZTF's own packets, and other files are refused."""

import numpy as np
import pytest
import torch

from alert_broker.cutouts.braai import Braai, BraaiConfig, build, from_published
from alert_broker.cutouts.tensors import CutoutTensors
from edgekit.bundle.store import open_bundle
from edgekit.errors import EdgekitError

SHAPES = {"conv1": (3, 3, 3, 4), "conv2": (3, 3, 4, 5), "conv3": (3, 3, 5, 6), "conv4": (3, 3, 6, 7)}
SHAPES |= {"fc_1": (36 * 7, 8), "fc_out": (8, 1)}


def random_weights():
    rng = np.random.default_rng(0)
    arrays = {f"{name}/kernel": rng.normal(0, 0.2, shape) for name, shape in SHAPES.items()}
    arrays |= {f"{name}/bias": rng.normal(0, 0.2, shape[-1]) for name, shape in SHAPES.items()}
    return {name: value.astype(np.float32) for name, value in arrays.items()}


@pytest.fixture
def weights(tmp_path):
    """A small network's random weights in the published layout."""
    np.savez(tmp_path / "small_d6_m7.npz", **random_weights())
    return tmp_path / "small_d6_m7.npz"


def naive(arrays, image):
    """One alert's score (height, width, 3), by the definition of each layer, in float64 and Keras layout."""
    x = image.astype(np.float64)
    for number, name in enumerate(("conv1", "conv2", "conv3", "conv4")):
        kernel, bias = arrays[f"{name}/kernel"].astype(np.float64), arrays[f"{name}/bias"]
        side = x.shape[0] - 2
        out = np.zeros((side, side, kernel.shape[-1])) + bias
        for dy in range(3):
            for dx in range(3):
                out += x[dy : dy + side, dx : dx + side] @ kernel[dy, dx]
        x = np.maximum(out, 0)
        if number % 2:
            step = (2, 4)[number // 2]
            side = x.shape[0] // step
            x = x[: side * step, : side * step].reshape(side, step, side, step, -1).max(axis=(1, 3))
    x = np.maximum(x.reshape(-1) @ arrays["fc_1/kernel"] + arrays["fc_1/bias"], 0)
    return 1 / (1 + np.exp(-(x @ arrays["fc_out/kernel"] + arrays["fc_out/bias"])[0]))


def score(model, inputs):
    with torch.no_grad():
        return model(torch.from_numpy(inputs)).softmax(dim=-1)[:, 1].numpy()


def test_the_network_computes_what_its_layers_say():
    images = np.random.default_rng(1).normal(0, 1, (3, 63, 63, 3)).astype(np.float32)
    arrays = random_weights()
    expected = [naive(arrays, image) for image in images]
    assert score(from_published(arrays), images) == pytest.approx(expected, abs=1e-6)
    # the twin reads the dense layer in PyTorch's own order
    swapped = arrays | {"fc_1/kernel": arrays["fc_1/kernel"].reshape(36, 7, 8).transpose(1, 0, 2).reshape(-1, 8)}
    assert np.abs(score(from_published(swapped), images) - expected).max() > 1e-3


def test_import(weights, edgekit, tmp_path):
    done = edgekit("import-braai", weights, "-o", tmp_path / "x.edge")
    assert done.status == 0, done.err
    bundle = open_bundle(tmp_path / "x.edge")
    assert bundle.manifest.preprocessing == {
        "id": "cutouts", "size": 63, "norm": "rows", "pad_value": 1e-9, "channels": "last"
    }  # fmt: skip
    assert bundle.manifest.classes == ("bogus", "real")
    inputs, outputs = bundle.golden()
    expected = score(from_published(random_weights()), inputs["cutouts"])
    assert outputs["probabilities"][:, 1] == pytest.approx(expected, abs=1e-6)
    assert bundle.model().config == BraaiConfig(filters=(4, 5, 6, 7), hidden=8)


@pytest.mark.parametrize(("name", "flags", "norm"), [("d6_m9", [], "image"), ("mine", ["--norm", "image"], "image")])
def test_the_norm_is_told_or_read_off_the_name(name, flags, norm, weights, edgekit, tmp_path):
    weights.rename(tmp_path / f"{name}.npz")
    assert edgekit("import-braai", tmp_path / f"{name}.npz", "-o", tmp_path / "x.edge", *flags).status == 0
    assert open_bundle(tmp_path / "x.edge").manifest.preprocessing["norm"] == norm


def test_the_bundle_exports_to_onnx_and_not_to_c(weights, edgekit, tmp_path):
    edgekit("import-braai", weights, "-o", tmp_path / "x.edge")
    done = edgekit("export", tmp_path / "x.edge", "--to", "onnx", "-o", tmp_path / "onnx")
    assert done.status == 0, done.err
    done = edgekit("export", tmp_path / "x.edge", "--to", "c", "-o", tmp_path / "c")
    assert done.status == 1
    assert "is a braai, which cannot be written as C" in done.err.replace("\n", " ")


def test_bad_input(weights, edgekit, tmp_path):
    target = tmp_path / "x.edge"

    def refused(*texts, norm="rows", **changes):
        arrays = {name: value for name, value in (random_weights() | changes).items() if value is not None}
        np.savez(tmp_path / "bad.npz", **arrays)
        done = edgekit("import-braai", tmp_path / "bad.npz", "-o", target, "--norm", norm)
        assert done.failed_with(1, "bad.npz", *texts), done.err

    refused("no array 'fc_1/bias'", **{"fc_1/bias": None})
    refused("unknown array 'more'", more=np.zeros(3, np.float32))
    refused("'conv2/bias'", "NaN", **{"conv2/bias": np.full(5, np.nan, np.float32)})
    refused("'conv2/bias'", "beyond float32", **{"conv2/bias": np.full(5, 1e300)})
    refused("'conv2/bias'", "int64", **{"conv2/bias": np.zeros(5, np.int64)})
    refused("'fc_1/kernel'", "expected (252, 8)", **{"fc_1/kernel": np.zeros((251, 8), np.float32)})
    refused("not a readable .npz", **{"conv2/bias": np.array([{}], object)})
    (tmp_path / "bad.npz").write_text("hello")
    assert edgekit("import-braai", tmp_path / "bad.npz", "-o", target, "--norm", "rows").failed_with(1, "bad.npz")
    assert edgekit("import-braai", tmp_path / "no.npz", "-o", target).failed_with(1, "no.npz", "does not exist")
    weights.rename(tmp_path / "mine.npz")
    assert edgekit("import-braai", tmp_path / "mine.npz", "-o", target).failed_with(1, "--norm rows or --norm image")
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filters": [16, 16, 32]}, "four whole numbers"),
        ({"filters": [16, 16, 32, 0]}, "filters = 0"),
        ({"size": 0}, "from 1"),
        ({"size": 19}, "leave nothing after the second pool"),
        ({"strides": [2, 1, 1, 1], "size": 36}, "leave nothing"),
        ({"strides": [1, 1, 1, 5]}, "strides = 5; expected a whole number from 1 to 4"),
        ({"strides": 2}, "strides = 2; expected a list of four whole numbers"),
        ({"hidden": 1 << 40}, "hidden = "),
        ({"dropout": [0, 0, 1]}, "0 <= dropout < 1"),
        ({"depth": 3}, "unknown argument 'depth'"),
        ({"filters": [16, 16, 16384, 16384]}, "a network of .* numbers; edgekit builds up to 268,435,456"),
        ({"size": 1024, "hidden": 16384}, "a network of .* numbers; edgekit builds up to 268,435,456"),
    ],
)
def test_arguments_of_a_strange_bundle_are_refused(arguments, message):
    with pytest.raises(EdgekitError, match=message):
        build(**arguments)


@pytest.mark.parametrize(("size", "strides"), [(20, (1, 1, 1, 1)), (37, (2, 1, 1, 1)), (81, (2, 1, 2, 2))])
def test_the_smallest_image_leaves_one_pixel(size, strides):
    config = BraaiConfig(size=size, filters=(1, 1, 1, 1), strides=strides, hidden=1)
    assert config.side == 1
    assert score(Braai(config).eval(), np.zeros((1, size, size, 3), np.float32)).shape == (1,)
    with pytest.raises(EdgekitError, match="leave nothing"):
        BraaiConfig(size=size - 1, strides=strides)


@pytest.mark.realdata
def test_d6_m7_gives_the_scores_in_the_packets(edgekit, tmp_path, shared_data):
    folder = shared_data / "braai"
    assert edgekit("import-braai", folder / "weights_d6_m7.npz", "-o", tmp_path / "m7.edge").status == 0
    bundle, known = open_bundle(tmp_path / "m7.edge"), np.load(folder / "ztf_triplets.npz")
    tensors = CutoutTensors.from_bundle(bundle.manifest.preprocessing, "m7")
    found = score(bundle.model(), tensors(known["images"]))
    assert len(found) == 228
    assert np.abs(found - known["drb"]).max() <= 1e-5
    assert ((found >= 0.5) == (known["drb"] >= 0.5)).all()
    # the twin has the other network's norm
    other = score(bundle.model(), CutoutTensors(norm="image")(known["images"]))
    assert np.abs(other - known["drb"]).max() > 0.1


@pytest.mark.realdata
def test_d6_m9_differs_in_few_verdicts(edgekit, tmp_path, shared_data):
    folder = shared_data / "braai"
    assert edgekit("import-braai", folder / "weights_d6_m9.npz", "-o", tmp_path / "m9.edge").status == 0
    bundle, known = open_bundle(tmp_path / "m9.edge"), np.load(folder / "ztf_triplets.npz")
    tensors = CutoutTensors.from_bundle(bundle.manifest.preprocessing, "m9")
    differ = (score(bundle.model(), tensors(known["images"])) >= 0.5) != (known["drb"] >= 0.5)
    assert 0 < differ.sum() <= 0.06 * 228
