"""Rows in memory become named arrays: which rows are refused, and how inputs get their names."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from edgekit.data.live import named_arrays
from edgekit.errors import EdgekitError

X, Y = np.zeros((8, 3)), np.arange(8) % 2


def test_names_of_the_inputs():
    assert set(named_arrays((X, Y))) == {"input", "labels", "split"}
    assert set(named_arrays(((X, X), Y))) == {"input_1", "input_2", "labels", "split"}
    assert set(named_arrays(((X, X), Y), ["a", "b"])) == {"a", "b", "labels", "split"}
    assert set(named_arrays(X)) == {"input", "split"}
    assert set(named_arrays((X, None))) == {"input", "split"}


def test_64_bits_become_32_and_whole_numbers_stay():
    found = named_arrays({"x": X, "codes": np.zeros((8, 2), np.int64), "labels": Y})
    assert found["x"].dtype == np.float32
    assert found["codes"].dtype == np.int64


def test_a_loader_of_mappings_and_of_several_inputs():
    rows = [{"x": torch.zeros(3), "labels": 1}] * 4
    assert named_arrays(DataLoader(rows, batch_size=2))["x"].shape == (4, 3)
    triples = [(torch.zeros(3), torch.ones(2), 1)] * 4
    found = named_arrays(DataLoader(triples, batch_size=3), ["a", "b"])
    assert found["b"].shape == (4, 2)
    assert found["labels"].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text", "data of the type str"),
        ((np.array(["a"]), Y[:1]), "a: a ndarray of dtype <U1"),
        (((X, X), Y), "the data has 2 inputs; the model takes 1: a"),
        (((X, Y), {"a": X}), "training rows hold a, labels, test rows a"),
        (((X, Y), (np.zeros((2, 4)), Y[:2])), "a: rows differ in shape"),
        ({}, "holds no array"),
        ((X, Y[:7]), r"the arrays differ in their number of rows: \{'a': 8, 'labels': 7\}"),
        (((X, Y[:7]), (X, np.arange(9) % 2)), r"number of rows: \{'a': 8, 'labels': 7\}"),
        ({"a": [[1.0], [1.0, 2.0]]}, "a: a list is not an array that numpy can hold"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "a: a Tensor is not an array that numpy can hold"),
        (DataLoader([torch.zeros(3)] * 2), "gives a Tensor; expected batches of"),
    ],
)
def test_what_cannot_be_read_is_refused(data, words):
    with pytest.raises(EdgekitError, match=words):
        named_arrays(data, ["a"])
