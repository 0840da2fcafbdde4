"""Operators as ONNX Runtime runs them, with their times."""

import numpy as np
import pytest
from onnx import helper

from edgekit.cost import profiled
from edgekit.cost.samples import graph_of


def chain(inner):
    weights = {"w": np.ones((inner, inner), np.float32)}
    nodes = [
        helper.make_node("MatMul", ["a", "w"], ["m"], "product"),
        helper.make_node("Softmax", ["m"], ["y"], "last", axis=-1),
    ]
    return graph_of(nodes, [(64, inner)], weights)


def test_every_operator_is_timed_under_its_name():
    model = chain(32)
    kernels = profiled.profiled(model, profiled.random_feeds(model, 1), seconds=0.02)
    assert {kernel.name for kernel in kernels} >= {"product", "last"}
    assert all(kernel.seconds > 0 for kernel in kernels)
    assert {operator.name for operator in profiled.optimized_work(model, 1).operators} >= {"product", "last"}


def test_a_planted_larger_product_takes_longer():
    times = []
    for inner in (32, 512):
        model = chain(inner)
        kernels = profiled.profiled(model, profiled.random_feeds(model, 1), seconds=0.05)
        times.append(next(kernel.seconds for kernel in kernels if kernel.name == "product"))
    assert times[1] > 5 * times[0]


def test_runs_that_others_interrupted_are_left_out():
    alone = [0.0, 0.0, 1.0, 0.99, 0.5, 0.98, 0.3]
    assert sorted(profiled._uninterrupted(alone)) == [3, 5]
    assert profiled._uninterrupted([1.0, 1.0, 1.0, 0.5, 0.6, 0.4, 0.3]) == [4], "the best quarter, if all were"


def test_the_middle_half_is_what_counts():
    assert profiled._middle([1.0, 2.0, 2.0, 100.0]) == pytest.approx(2.0)
