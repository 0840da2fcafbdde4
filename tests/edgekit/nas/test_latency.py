"""The correction of predicted times, and the exported graph that is measured."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgekit.errors import EdgekitError
from edgekit.nas import latency
from edgekit.nas.clock import ThisMachine
from edgekit.nas.latency import GROUPS, Correction, Measured, calibrate, corrected, exported, measure
from edgekit.nn.hiera_config import HieraConfig

SMALL = HieraConfig((1, 1), ("rep", "global"), (1, 2), (True,), 8, 4, 2, "conv3x2", image=16, channels=1, classes=3)

LEVIT = HieraConfig((1, 1), ("levit", "levit"), (1, 2), (True,), 8, 4, 2, "conv3x2", image=16, channels=1, classes=3)


def networks(count, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.uniform(1e-4, 3e-3, (count, len(GROUPS)))
    seconds = parts @ np.array([0.8, 1.5, 1.1, 2.0]) * rng.normal(1, noise, count)
    return [tuple(row) for row in parts.tolist()], seconds.tolist()


def test_the_factors_are_found():
    parts, seconds = networks(60)
    found = corrected(parts, seconds)
    np.testing.assert_allclose(found.factors, [0.8, 1.5, 1.1, 2.0], rtol=0.05)
    assert found.error < 0.02
    assert found.seconds(parts[0]) == pytest.approx(seconds[0], rel=0.05)


def test_the_error_is_that_of_networks_not_seen():
    parts, seconds = networks(8, noise=0.1)
    found = corrected(parts, seconds)
    unseen = []
    for left in range(8):
        others = [n for n in range(8) if n != left]
        fit = corrected([parts[n] for n in others], [seconds[n] for n in others])
        unseen.append(abs(fit.seconds(parts[left]) / seconds[left] - 1))
    assert found.error == pytest.approx(np.median(unseen))
    assert found.worst == pytest.approx(max(unseen))


def test_a_group_that_no_network_has_keeps_the_tables_time():
    parts, seconds = networks(8)
    parts = [(0.0, *row[1:]) for row in parts]
    assert corrected(parts, seconds).factors[0] == pytest.approx(1.0)


def test_two_networks_are_too_few():
    with pytest.raises(EdgekitError, match="2 networks were measured; the correction needs at least 3"):
        corrected(*networks(2))


def test_the_measured_graph_is_the_fused_network_with_a_free_batch():
    graph = exported(SMALL)
    assert not [node for node in graph.graph.node if node.op_type == "BatchNormalization"]
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    (found,) = measure([graph], 3, seconds=0.05)
    assert 0 < found.seconds < 1
    assert 0 < found.share <= 1.05


def on_one_core(body):
    """Run with this thread on one core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        return body()
    finally:
        os.sched_setaffinity(0, before)


def test_two_busy_processes_on_the_core_are_noticed():
    """On an idle core the calls have most of the time, behind two other processes about a third."""
    graph = [exported(SMALL)]

    def share():
        return measure(graph, seconds=0.5)[0]

    free = on_one_core(share)
    program = [sys.executable, "-c", "while True: pass"]
    others = on_one_core(lambda: [subprocess.Popen(program) for _ in range(2)])
    try:
        loaded = on_one_core(share)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert loaded.disturbed
    assert loaded.share < 0.7
    assert loaded.share < free.share
    assert not Measured(1e-3, 0.95).disturbed


def test_a_calibration_beside_other_programs_says_so(monkeypatch):
    monkeypatch.setattr(latency, "parts_of", lambda work, table: (1e-3, 1e-3, 1e-3, 1e-3))
    for share, disturbed in ((1.0, False), (0.5, True)):
        taken = [Measured(4e-3, 1.0), Measured(4e-3, share), Measured(4e-3, 1.0)]
        monkeypatch.setattr(latency, "measure", lambda graphs, batch, taken=taken: taken)
        found = calibrate([SMALL] * 3, None)
        assert found.disturbed == disturbed
        text = ThisMachine(None, found, 1).describe()["text"]
        assert ("Other programs ran" in text) == disturbed


def test_no_correction_changes_nothing():
    assert Correction().seconds((1.0, 2.0, 3.0, 4.0)) == 10.0


@pytest.mark.parametrize("config", [SMALL, LEVIT])
def test_the_graph_gives_the_networks_probabilities(config):
    import onnxruntime

    from edgekit.nas.bundles import bundle_of

    bundle = bundle_of(config)
    inputs, expected = bundle.golden()
    session = onnxruntime.InferenceSession(exported(config).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, dict(inputs))
    torch.testing.assert_close(found, expected["probabilities"], rtol=1e-4, atol=1e-5)
