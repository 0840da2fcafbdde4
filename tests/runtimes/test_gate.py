"""The gate for streams: replayable, bounded, honest about reuse, and calibrated so that answers seldom change."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError
from runtimes.gate import (
    BoundedQueue,
    Gate,
    GatedModel,
    Recorded,
    calibrate,
    draw,
    noise_distance,
    relative_distance,
    replay,
    upper_bound,
)  # fmt: skip


def difference(first, second):
    return abs(first - second)


def answers(values, gate=None, **options):
    model = GatedModel(gate or Gate(1.0, 4), lambda value: ("of", value), difference, **options)
    return [model.answer("s", number, value) for number, value in enumerate(values)], model


def test_draws_are_the_same_on_every_machine_and_spread_evenly():
    assert draw("camera", 17) == 0.12892802633484157
    found = [draw("camera", number) for number in range(4000)]
    assert 0 <= min(found) < max(found) < 1
    assert abs(np.mean(found) - 0.5) < 0.02
    assert draw("camera", 1) != draw("camera1", 1)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=60), st.integers(0, 5))
@settings(max_examples=100, deadline=None)
def test_every_input_gets_an_answer_that_says_whose_it_is_and_skips_are_bounded(values, most):
    found, model = answers(values, Gate(1.0, most))
    since = 0
    for number, item in enumerate(found):
        if item.fresh:
            assert item.answer == ("of", values[number])
            assert item.reused_from is None
            since = 0
        else:
            since += 1
            assert item.reused_from == number - since
            assert item.answer == ("of", values[item.reused_from])
            assert abs(values[number] - values[item.reused_from]) < 1.0
        assert since <= most
    assert model.computed + model.reused == len(values)
    assert answers(values, Gate(1.0, most))[0] == found


def test_a_frozen_stream_is_computed_once_in_every_most_skips_and_one():
    found, _ = answers([5.0] * 25)
    assert [number for number, item in enumerate(found) if item.fresh] == [0, 5, 10, 15, 20]


def test_what_is_not_a_number_or_far_away_is_computed():
    found, _ = answers([0.0, 1.0, math.nan, 0.0, 100.0], Gate(1.0, 1000))
    assert [item.fresh for item in found] == [True, True, True, True, True]


def test_a_model_that_raises_leaves_the_gate_as_it_was():
    calls = []

    def compute(value):
        calls.append(value)
        if value == 7.0 and calls.count(7.0) == 1:
            raise RuntimeError("no memory")
        return value

    model = GatedModel(Gate(1.0, 4), compute, difference)
    model.answer("s", 0, 1.0)
    with pytest.raises(RuntimeError):
        model.answer("s", 1, 7.0)
    assert model.answer("s", 1, 7.0).fresh
    with pytest.raises(EdgekitError, match=r"the input 1 comes after 1; expected increasing"):
        model.answer("s", 1, 7.0)


def test_references_of_few_streams_are_kept():
    model = GatedModel(Gate(1.0, 100), lambda value: value, difference, streams=2)
    for stream in ("a", "b", "a", "c"):
        model.answer(stream, model.computed + model.reused, 1.0)
    assert not model.answer("a", 10, 1.0).fresh
    assert model.answer("b", 10, 1.0).fresh


def test_a_transient_that_a_similarity_overlooks_is_always_computed():
    rng = np.random.default_rng(0)
    sky = rng.normal(1.0, 0.1, (64, 64))
    star = sky + rng.normal(0, 0.1, sky.shape)
    star[30, 30] += 2.0  # twenty times the noise
    cosine = float((sky * star).sum() / np.linalg.norm(sky) / np.linalg.norm(star))
    assert cosine > 0.98
    gate = Gate(20.0, 1000)
    far = noise_distance(0.1)(sky, star)
    again = noise_distance(0.1)(sky, sky)
    assert np.mean([gate.admits("s", number, far, 0) for number in range(500)]) > 0.9
    assert not any(gate.admits("s", number, again, 0) for number in range(500))
    assert relative_distance(np.zeros(3), np.ones(3)) == math.inf
    assert relative_distance(np.ones(4), np.full(4, 1.5)) == 0.5


def test_the_bound_is_that_of_the_binomial_distribution():
    stats = pytest.importorskip("scipy.stats")
    for events, trials in ((0, 50), (3, 200), (40, 1000)):
        expected = stats.beta.ppf(0.95, events + 1, trials - events)
        assert upper_bound(events, trials, 0.95) == pytest.approx(expected, rel=1e-6)
    assert upper_bound(5, 5, 0.95) == upper_bound(0, 0, 0.95) == 1.0


def recorded(number, seed, frames=6):
    """Return scenes of a few inputs. The answer is a class that changes where the value passes a whole number."""
    rng = np.random.default_rng(seed)
    found = []
    for scene in range(number):
        values = rng.uniform(0, 10) + np.cumsum(rng.normal(0, 0.02, frames))
        found.append(Recorded(f"{seed}-{scene}", values.tolist(), np.floor(values).tolist()))
    return found


def share_of_bad_calibrations(calibration, trials=24, eps=0.02):
    """Return how often a gate that was calibrated on some scenes changes more than eps of the answers of others."""
    bad = 0
    for trial in range(trials):
        gate = calibration(recorded(40, 1000 + trial), eps)
        if gate is not None:
            checked = replay(CHECKED, difference, gate)
            bad += checked.changed > eps * checked.skipped
    return bad / trials


CHECKED = recorded(1000, 7)


def proven(streams, eps):
    try:
        return calibrate(streams, difference, eps=eps, most_skips=5).gate
    except EdgekitError:
        return None  # every input is computed


def unproven(streams, eps):
    """The planted failure: the largest scale whose share of changes was at most eps, without a bound."""
    from runtimes.gate import SCALES

    good = [gate for gate in (Gate(scale, 5) for scale in SCALES) if _share(streams, gate) <= eps]
    return good[-1]


def _share(streams, gate):
    found = replay(streams, difference, gate)
    return found.changed / max(1, found.skipped)


def test_other_streams_confirm_the_calibration():
    assert share_of_bad_calibrations(proven) <= 0.1


def test_the_check_of_the_calibration_finds_one_without_a_bound():
    assert share_of_bad_calibrations(unproven) > 0.2


def test_a_calibrated_gate_saves_work():
    found = calibrate(recorded(1500, 3), difference, eps=0.05, most_skips=5)
    assert found.bound <= 0.05
    assert found.skipped > 0.5 * found.inputs
    assert 0 < found.changed < found.skipped * 0.05


def test_too_few_inputs_prove_nothing():
    with pytest.raises(EdgekitError, match=r"inputs were skipped, and 299 without a change are needed"):
        calibrate(recorded(10, 1), difference, eps=0.01, most_skips=5)
    with pytest.raises(EdgekitError, match="expected numbers between 0 and 1"):
        calibrate([], difference, eps=0.0, most_skips=5)
    with pytest.raises(EdgekitError, match="the gate's scale is 0"):
        Gate(0.0, 1)
    with pytest.raises(EdgekitError, match="most_skips = -1"):
        Gate(1.0, -1)


def test_a_full_queue_drops_the_oldest_and_counts_it_and_nothing_is_stuck_at_the_end():
    queue = BoundedQueue(3, "latest")
    for number in range(10):
        queue.put(number)
    queue.close()
    assert list(queue) == [7, 8, 9]
    assert queue.dropped == 7
    with pytest.raises(EdgekitError, match="closed"):
        queue.put(1)


def test_a_queue_that_blocks_loses_nothing():
    queue, found = BoundedQueue(2, "block"), []
    reader = threading.Thread(target=lambda: found.extend(queue))
    writer = threading.Thread(target=lambda: [queue.put(number) for number in range(500)])
    writer.start()
    reader.start()
    writer.join(20)
    queue.close()
    reader.join(20)
    assert found == list(range(500))
    assert queue.dropped == 0
