"""Predicted step times: a known law is found again, and a device that becomes slower is noticed."""

import numpy as np
import pytest

from runtimes.daemon.step_time import SURPRISE, StepTime, shape_of

LAW = (2.0e-3, 0.7e-3, 0.35e-3 / 1024, 0.1e-3)  # seconds: of a step, a token, a pair and a sequence


def seconds_of(shape, law=LAW):
    return law[0] + law[1] * shape.tokens + law[2] * shape.pairs + law[3] * shape.sequences


def shapes(number, seed=0):
    """Return steps as a scheduler makes them: some answers, and a chunk of a prompt beside them."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        answers = rng.integers(50, 1500, rng.integers(1, 6)).tolist()
        yield shape_of(len(answers) + int(rng.integers(0, 64)), answers, int(rng.integers(0, 1400)))


def taught(number=300, noise=0.02, seed=0):
    time, rng = StepTime(), np.random.default_rng(seed)
    for shape in shapes(number, seed):
        time.learn(shape, seconds_of(shape) * float(np.exp(rng.normal(0, noise))))
    return time


def worst_error(time, law=LAW):
    return max(abs(time.seconds(shape) / seconds_of(shape, law) - 1) for shape in shapes(50, seed=9))


def test_the_law_is_found_again_and_a_wrong_law_is_not():
    time = taught()
    assert worst_error(time) < 0.03
    assert worst_error(time, (2 * LAW[0], *LAW[1:])) > 0.03


def test_a_careful_prediction_is_seldom_exceeded():
    time, rng = taught(noise=0.05), np.random.default_rng(3)
    over = [seconds_of(shape) * float(np.exp(rng.normal(0, 0.05))) > time.at_most(shape) for shape in shapes(400, 4)]
    assert 0 < np.mean(over) < 0.02


@pytest.mark.parametrize("factor", [2.0, 0.5, 4.0])
def test_another_speed_is_known_after_two_steps(factor):
    time = taught()
    slow = list(shapes(2, seed=5))
    for shape in slow:
        time.learn(shape, factor * seconds_of(shape))
    assert time.changes == 1
    assert worst_error(time, tuple(factor * number for number in LAW)) < 0.05
    assert worst_error(time) > 0.3  # the old speed is forgotten


def test_one_slow_step_makes_the_next_prediction_careful_and_changes_nothing_else():
    time, shape = taught(), next(shapes(1, seed=6))
    before = time.seconds(shape), time.at_most(shape)
    time.learn(shape, 2 * SURPRISE * before[0])
    assert time.at_most(shape) == pytest.approx(2 * SURPRISE * before[1])
    assert time.seconds(shape) == before[0]
    time.learn(shape, before[0])
    assert time.at_most(shape) == pytest.approx(before[1], rel=0.05)
    assert time.changes == 0


@pytest.mark.parametrize("seconds", [0.01, 0.03, 0.1])
def test_a_budget_fills_its_time_and_one_token_more_would_not_fit(seconds):
    time, answers, prompt = taught(), [300, 900], 500
    tokens = time.budget(seconds, answers, prompt, 512)
    assert time.at_most(shape_of(tokens, answers, prompt)) <= seconds
    assert tokens == 512 or time.at_most(shape_of(tokens + 1, answers, prompt)) > seconds
    assert time.budget(0.0, answers, prompt, 512) == 1


def test_steps_of_one_size_leave_the_prediction_of_that_size_right():
    time = StepTime()
    shape = shape_of(3, [100, 100, 100], 0)
    for _ in range(5000):
        time.learn(shape, 0.004)
    assert time.seconds(shape) == pytest.approx(0.004, rel=1e-3)
    for other in shapes(100, seed=8):
        time.learn(other, 0.004 / seconds_of(shape) * seconds_of(other))
    assert worst_error(time, tuple(0.004 / seconds_of(shape) * number for number in LAW)) < 0.05


def test_shapes_count_each_pair_of_tokens():
    shape = shape_of(5, [10, 20], 7)
    assert (shape.tokens, shape.sequences) == (5, 3)
    assert shape.pairs == 11 + 21 + 8 + 9 + 10
    assert shape_of(1, [10, 20], 7).pairs == 11
