"""The sampler finds a planted slowness. A drifting clock and the position of a call in the round do not mislead it."""

import numpy as np
import pytest

from edgekit.cost.timing import in_turns, ratio_interval, thread_seconds, timed


def fixed(*seconds):
    return lambda: seconds


def of(before, after, **options):
    taken = in_turns([before, after], **options)[:, :, 0]
    return ratio_interval(taken[:, 0], taken[:, 1])


def test_a_planted_slowness_is_seen_and_twins_are_equal():
    def work(rounds):
        array = np.ones(4096, np.float32)
        return lambda: [np.sqrt(array) for _ in range(rounds)]

    import time

    once, again, twice = (timed(work(rounds), time.thread_time) for rounds in (300, 300, 600))
    ratio, low, high = of(once, twice, seconds=0.4)
    assert 1.6 < low <= ratio <= high < 2.5
    ratio, _, _ = of(once, again, seconds=0.4)
    assert 0.9 < ratio < 1.1


def drifting(factor):
    """Return a call on a machine that gets slower with each call, and the seconds that it takes."""
    calls = []

    def call(seconds):
        calls.append(seconds)
        return (seconds * factor ** len(calls),)

    return call


def test_a_clock_that_drifts_does_not_pass_for_a_difference():
    call = drifting(1.02)
    ratio, _, _ = of(lambda: call(1.0), lambda: call(1.0), least=50, most=50)
    assert ratio == pytest.approx(1, abs=0.03)
    # planted: the same calls one after the other
    call = drifting(1.02)
    first, second = (in_turns([lambda: call(1.0)], least=50, most=50)[:, 0, 0] for _ in range(2))
    assert ratio_interval(first, second)[0] > 2


def test_the_first_of_a_round_changes():
    order = []

    def call(name):
        return lambda: order.append(name) or (1.0,)

    in_turns([call("a"), call("b"), call("c")], least=3, most=3, warmup=1)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_a_call_that_suffers_from_its_place_is_not_blamed():
    """The first call of a round takes twice as long."""
    made = []

    def call():
        made.append(None)
        return (2.0 if len(made) % 2 else 1.0,)

    taken = in_turns([call, call], least=40, most=40)[:, :, 0]
    assert taken.mean(axis=0) == pytest.approx([1.5, 1.5])
    # planted: without the rotation, the first is always the slow one
    assert np.array([[call()[0] for _ in range(2)] for _ in range(40)]).mean(axis=0).tolist() == [2.0, 1.0]


def test_the_warm_up_is_thrown_away_and_its_last_round_tells_how_many_fit():
    seconds = iter([100.0, 0.5, *[0.25] * 100])
    taken = in_turns([lambda: (next(seconds),)], seconds=10, least=3, most=400)
    assert taken.shape == (20, 1, 1)
    assert (taken == 0.25).all()


@pytest.mark.parametrize(("once", "rounds"), [(100.0, 3), (1e-12, 9), (1.0, 5)])
def test_the_number_of_rounds_is_bounded(once, rounds):
    assert len(in_turns([fixed(once)], seconds=5, least=3, most=9)) == rounds


def test_several_clocks():
    taken = in_turns([fixed(1.0, 2.0), fixed(3.0, 4.0)], least=2, most=2)
    assert taken[0].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_clock_is_read_around_the_call_only():
    now = [0.0]

    def call():
        now[0] += 7

    assert timed(call, lambda: now[0])() == (7.0,)
    assert thread_seconds(lambda: sum(range(100_000))) > 0


def test_a_ratio_survives_a_clock_without_grain():
    nothing = np.zeros(9)
    assert ratio_interval(nothing, nothing) == (1.0, 1.0, 1.0)


def test_the_interval_holds_the_truth_and_excludes_another():
    rng = np.random.default_rng(0)
    before, after = rng.normal(1, 0.05, 200), 1.1 * rng.normal(1, 0.05, 200)
    ratio, low, high = ratio_interval(before, after)
    assert low < 1.1 < high
    assert 1.0 < low < ratio < high < 1.2
