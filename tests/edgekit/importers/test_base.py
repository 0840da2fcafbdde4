"""Golden rows from what was given, and files that are never read."""

from pathlib import Path

import numpy as np
import pytest

from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from edgekit.importers.base import GOLDEN_ROWS, PICKLES, golden_rows, synthetic_rows, unsafe

SPECS = (TensorSpec("x", ("batch", 3)), TensorSpec("n", ("batch",), "int64"))


def given(rows, **changes):
    return {"x": np.arange(3.0 * rows, dtype=np.float32).reshape(rows, 3), "n": np.arange(rows), **changes}


@pytest.mark.parametrize("rows", [1, GOLDEN_ROWS, GOLDEN_ROWS + 5])
def test_the_first_rows_are_taken(rows):
    found = golden_rows(SPECS, given(rows))
    assert found["n"].tolist() == list(range(min(rows, GOLDEN_ROWS)))
    assert np.array_equal(found["x"], given(rows)["x"][:GOLDEN_ROWS])


def test_arrays_that_the_model_does_not_take_are_left_out():
    """A data set also has labels and a split."""
    assert set(golden_rows(SPECS, given(2, labels=np.zeros(2)))) == {"x", "n"}


def test_without_any_they_are_made_up_and_all_differ():
    found, _ = synthetic_rows(SPECS, {}, lambda rows: {"y": rows["x"]})
    assert {len(array) for array in found.values()} == {GOLDEN_ROWS}
    assert [str(found[spec.name].dtype) for spec in SPECS] == ["float32", "int64"]
    assert len(np.unique(found["x"])) == found["x"].size


FREE = (TensorSpec("image", ("batch", 3, "height", "width")),)


def test_the_first_proposal_with_which_the_model_runs_to_finite_numbers_is_taken():
    def run(rows):
        height, width = rows["image"].shape[2:]
        if (height, width) == (224, 224):
            raise EdgekitError("too large")
        return {"y": np.full((len(rows["image"]), 1), np.nan if height == 48 else width)}

    inputs, outputs = synthetic_rows(FREE, {}, run)
    assert inputs["image"].shape[2:] == (64, 64)
    assert (outputs["y"] == 64).all()


def test_the_error_of_the_last_proposal_is_the_one_that_is_raised():
    def run(rows):
        raise EdgekitError(f"no {rows['image'].shape[2:]}")

    with pytest.raises(EdgekitError, match=r"no \(2, 2\)"):
        synthetic_rows(FREE, {}, run)


def test_outputs_that_are_never_finite_are_still_the_models():
    _, outputs = synthetic_rows(FREE, {}, lambda rows: {"y": np.full((len(rows["image"]), 1), np.inf)})
    assert np.isinf(outputs["y"]).all()


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": given(2)["x"]}, "input 'n' is missing"),
        (given(2, x=np.zeros((2, 4), np.float32)), "input 'x' has shape"),
        (given(2, x=np.full((2, 3), np.nan, np.float32)), "input 'x' holds NaN"),
        (given(2, n=np.arange(3)), "differ in batch size"),
    ],
)
def test_rows_that_do_not_fit_are_refused(arrays, words):
    with pytest.raises(EdgekitError, match=words):
        golden_rows(SPECS, arrays)


@pytest.mark.parametrize("suffix", PICKLES)
def test_a_pickle_is_named_with_what_to_do_instead(suffix):
    said = str(unsafe(Path(f"model{suffix}")))
    assert f"a {suffix} file is a pickle" in said
    assert "safetensors" in said


def test_weights_alone_are_told_from_a_model():
    assert str(unsafe(Path("a/w.safetensors"))).endswith("import package.module:function --weights a/w.safetensors")


@pytest.mark.parametrize("name", ["model.h5", "model", "model.PT2"])
def test_another_file_is_no_pickle(name):
    said = str(unsafe(Path(name)))
    assert "pickle" not in said
    assert f"{name}: not a model that edgekit reads" in said
