"""edgekit import-t2"""

import numpy as np
import pytest

from edgekit.bundle.store import open_bundle

SHAPES = {"conv_embedding": (1, 2, 32), "ffn.0": (32, 128), "ffn.1": (128, 32), "classifier": (32, 14)}
SHAPES |= {f"att.{part}": (32, 32) for part in ("query", "key", "value", "combine")}


@pytest.fixture
def weights(tmp_path):
    """Write random weights in the published layout to a file."""
    rng = np.random.default_rng(0)
    arrays = {f"{name}.kernel": rng.normal(size=shape) for name, shape in SHAPES.items()}
    arrays |= {f"{name}.bias": rng.normal(size=shape[-1]) for name, shape in SHAPES.items()}
    arrays |= {f"ln{n}.{part}": rng.normal(size=32) for n in (1, 2) for part in ("gamma", "beta")}
    np.savez(tmp_path / "weights_x_noZ.npz", **{name: value.astype(np.float32) for name, value in arrays.items()})
    return tmp_path / "weights_x_noZ.npz"


def test_import(weights, edgekit, tmp_path):
    done = edgekit("import-t2", weights, "-o", tmp_path / "x.edge")
    assert done.status == 0, done.err
    assert "13,262 parameters" in done.out
    bundle = open_bundle(tmp_path / "x.edge")
    assert [spec.name for spec in bundle.manifest.inputs] == ["light_curve"]
    assert len(bundle.manifest.classes) == len(bundle.manifest.class_ids) == 14
    assert bundle.manifest.preprocessing is None
    _, outputs = bundle.golden()
    assert outputs["probabilities"].shape == (8, 14)
    assert outputs["probabilities"].sum(axis=1) == pytest.approx(np.ones(8), abs=1e-5)
    assert bundle.model().config.classes == 14


@pytest.mark.parametrize(("flags", "name"), [(["--redshift"], "a.npz"), ([], "weights_x_wZ.npz")])
def test_redshift_is_told_or_read_off_the_name(flags, name, weights, edgekit, tmp_path):
    weights.rename(tmp_path / name)
    assert edgekit("import-t2", tmp_path / name, "-o", tmp_path / "x.edge", *flags).status == 0
    bundle = open_bundle(tmp_path / "x.edge")
    assert [spec.name for spec in bundle.manifest.inputs] == ["light_curve", "context"]
    assert bundle.model().config.context == 2


@pytest.mark.realdata
@pytest.mark.parametrize("name", ["t2_GR_noZ", "tinho_UGRIZY_wZ"])
def test_published_weights_give_the_published_probabilities(name, edgekit, tmp_path, shared_data):
    from edgekit.data.dataset import Dataset
    from edgekit.nn.training import probabilities

    folder = shared_data / "t2_reference"
    assert edgekit("import-t2", folder / f"weights_{name}.npz", "-o", tmp_path / "x.edge").status == 0
    reference = np.load(folder / "reference_io.npz")
    inputs = {"light_curve": reference["inputs_gr" if "GR_" in name and "UG" not in name else "inputs_ugrizy"]}
    if "wZ" in name:
        inputs["context"] = reference["inputs_z"]
    rows = Dataset(inputs, np.zeros(256, np.int64)).take(np.arange(64))
    got = probabilities(open_bundle(tmp_path / "x.edge").model(), rows)
    assert np.abs(got - reference[f"probs_{name}"][:64]).max() < 3e-5


def test_bad_input(weights, edgekit, tmp_path):
    target = tmp_path / "x.edge"
    assert edgekit("import-t2", tmp_path / "no.npz", "-o", target).failed_with(1, "no.npz", "does not exist")
    (tmp_path / "text.npz").write_text("hello")
    assert edgekit("import-t2", tmp_path / "text.npz", "-o", target).failed_with(1, "text.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    assert edgekit("import-t2", tmp_path / "other.npz", "-o", target).failed_with(1, "not a published t2 weight set")
    arrays = dict(np.load(weights))
    np.savez(tmp_path / "nan.npz", **arrays | {"ffn.0.bias": np.full(128, np.nan, np.float32)})
    assert edgekit("import-t2", tmp_path / "nan.npz", "-o", target).failed_with(1, "ffn.0.bias", "NaN")
    fewer = {"classifier.kernel": np.zeros((32, 5), np.float32), "classifier.bias": np.zeros(5, np.float32)}
    np.savez(tmp_path / "five.npz", **arrays | fewer)
    assert edgekit("import-t2", tmp_path / "five.npz", "-o", target).failed_with(1, "5 classes")
    assert not target.exists()
    edgekit("import-t2", weights, "-o", target)
    assert edgekit("import-t2", weights, "-o", target).failed_with(1, "--force")
    assert edgekit("import-t2", weights, "-o", target, "--force").status == 0
