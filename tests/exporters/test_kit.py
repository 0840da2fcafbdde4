"""Shapes of engines: they follow the model's constraints, and the golden data fits in them."""

import numpy as np
import pytest

from edgekit.bundle.format import Manifest, assemble
from edgekit.bundle.tensors import TensorSpec
from edgekit.errors import EdgekitError
from exporters.kit import profile_of


def bundle(length=18):
    inputs = (TensorSpec("ids", ("batch", "9*faces"), "int64"), TensorSpec("time", ("batch", 1)))
    golden = {"ids": np.zeros((4, length), np.int64), "time": np.zeros((4, 1), np.float32)}
    manifest = Manifest("toy", "t2", {}, inputs, (TensorSpec("y", ("batch", 1)),))
    return assemble(manifest, {}, {}, (golden, {"y": np.zeros((4, 1), np.float32)}))


def test_shapes_follow_the_golden_data_and_the_multiples():
    assert profile_of(bundle(), ()) == {
        "ids": {"min": [1, 9], "opt": [16, 18], "max": [64, 72]},
        "time": {"min": [1, 1], "opt": [16, 1], "max": [64, 1]},
    }


def test_axes_can_be_given_with_or_without_their_multiple():
    given = profile_of(bundle(), ("batch=2:4:8", "faces=9:18:90"))
    assert given["ids"] == {"min": [2, 9], "opt": [4, 18], "max": [8, 90]}
    assert given == profile_of(bundle(), ("batch=2:4:8", "9*faces=9:18:90"))


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("batch", "expected NAME=LEAST:BEST:LARGEST"),
        ("bath=1:2:3", "unknown axis 'bath'.*did you mean 'batch'"),
        ("batch=3:2:1", "expected three rising lengths"),
        ("batch=0:2:4", "at least 1"),
        ("faces=9:18:100", "multiples of 9"),
        ("faces=27:36:45", "leaves out the golden data's 18"),
    ],
)
def test_wrong_axes_are_named(axis, message):
    with pytest.raises(EdgekitError, match=message):
        profile_of(bundle(), (axis,))
