"""The guard: what it keeps, what it rolls back, and that it sees a slower, an unsteady and a wrong session."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest

from edgekit.compression import guard
from edgekit.compression.guard import Agreement, Latency, Limits, State, compare_batches, compare_latency, judge, tiled
from edgekit.compression.metrics import Measurement
from edgekit.errors import EdgekitError

LIMITS = Limits(max_loss=0.01, max_slowdown=0.05, min_gain=0.01)
INPUTS = {"x": np.arange(24, dtype=np.float32).reshape(12, 2)}


def state(size, quality=0.5):
    return State(Measurement(quality, quality - 0.1, quality + 0.1, 100), size, 1000)


def change(value):
    return Measurement(value, value - 0.001, value + 0.001, 100)


def ratio(value, *, width=0.02, batch=16):
    return Latency(batch, 1.0, value, value, value - width, value + width)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"objective": "speed"}, "objective 'speed'; expected one of: any, size, latency"),
        ({"batches": ()}, r"batch sizes \(\): expected one or more, each at least 1"),
        ({"batches": (16, 0)}, r"batch sizes \(16, 0\)"),
    ],
)
def test_limits_that_mean_nothing_are_refused(wrong, words):
    with pytest.raises(EdgekitError, match=words):
        Limits(**wrong)
    assert Limits(batches=(1,), objective="size").batches == (1,)


# bytes after (1000 before), loss, ratios of the latencies -> kept?, words of the reason
CASES = {
    "smaller": (500, 0.0, [1.0], True, "2.00 times smaller"),
    "faster": (1000, 0.0, [0.5], True, "2.00 times faster at batch 16"),
    "smaller and faster": (500, 0.0, [0.5], True, "smaller, 2.00 times faster"),
    "a little loss is allowed": (500, 0.01, [1.0], True, "smaller"),
    "better quality, same size": (1000, -0.1, [1.0], False, "gains nothing: 1,000 to 1,000 bytes"),
    "too much loss": (500, 0.0101, [1.0], False, r"costs \+0.0101 .* 0.01 allowed"),
    "slower": (500, 0.0, [1.2], False, r"slower at batch 16: 1.20 times .*1.18, 1.22.* 1.05 allowed"),
    "slower at one batch size": (500, 0.0, [0.5, 1.3], False, "slower at batch 17: 1.30"),
    "slower within the allowance": (500, 0.0, [1.04], True, "smaller"),
    "slower, by more than allowed or a little less": (500, 0.0, [1.06], False, "slower at batch 16: 1.06"),
    "slower at several sizes, the worst is named": (500, 0.0, [1.3, 1.5, 1.4], False, "slower at batch 17: 1.50 "),
    "one percent smaller": (990, 0.0, [1.0], True, "1.01 times smaller"),
    "faster by just one percent": (1000, 0.0, [0.97], False, "gains nothing"),  # the interval ends at 0.99
    "faster by more": (1000, 0.0, [0.969], True, "1.03 times faster at batch 16"),
    "no number though its loss is one": (500, -math.inf, [0.5], False, "the metric is 0.5, not a number"),
    "half a percent smaller": (995, 0.0, [1.0], False, "gains nothing"),
    "perhaps faster": (1000, 0.0, [0.98], False, "gains nothing"),
    "larger but faster": (2000, 0.0, [0.5], True, "2.00 times faster"),
    "larger": (1001, 0.0, [1.0], False, "gains nothing"),
    "no number": (500, math.nan, [0.5], False, "not a number"),
}


@pytest.mark.parametrize(("size", "loss", "ratios", "kept", "words"), CASES.values(), ids=CASES)
def test_judge(size, loss, ratios, kept, words):
    after = state(size, quality=math.nan if math.isnan(loss) else 0.5)
    latency = [ratio(value, batch=16 + number) for number, value in enumerate(ratios)]
    verdict = judge(state(1000), after, change(loss), latency, LIMITS)
    assert verdict.kept is kept
    assert re.search(words, verdict.reason), verdict.reason
    assert verdict.useless == ("gains nothing" in words)


@pytest.mark.parametrize(
    ("objective", "size", "time", "reason"),
    [
        ("any", 500, 0.5, "2.00 times smaller, 2.00 times faster at batch 16"),
        ("size", 500, 0.5, "2.00 times smaller"),
        ("latency", 500, 0.5, "2.00 times faster at batch 16"),
        ("any", 1000, 1.0, "gains nothing: 1,000 to 1,000 bytes, and no faster at any batch size"),
        ("size", 1000, 0.5, "gains nothing: 1,000 to 1,000 bytes, and no faster at any batch size (objective: size)"),
        (
            "latency",
            500,
            1.0,
            "gains nothing: 1,000 to 500 bytes, and no faster at any batch size (objective: latency)",
        ),
    ],
)
def test_only_the_objective_counts_as_a_gain(objective, size, time, reason):
    verdict = judge(state(1000), state(size), change(0.0), [ratio(time)], replace(LIMITS, objective=objective))
    assert (verdict.kept, verdict.reason) == ("nothing" not in reason, reason)


def test_what_may_as_well_be_as_fast_is_not_called_slower():
    verdict = judge(state(1000), state(500), change(0.0), [ratio(1.06, width=0.05)], LIMITS)
    assert verdict.kept


@pytest.mark.parametrize(("against", "low", "kept"), [(1.06, 1.03, False), (1.06, 1.01, True), (1.04, 1.03, True)])
def test_the_best_float_form_is_a_rival_too(against, low, kept):
    latency = replace(ratio(0.8), against_best=against, against_best_low=low)
    verdict = judge(state(1000), state(500), change(0.0), [latency], LIMITS)
    assert verdict.kept is kept
    assert kept or "original's best float32 form" in verdict.reason


def test_the_batch_that_is_worst_against_the_best_float_form_is_named():
    latency = [
        replace(ratio(0.8, batch=batch), against_best=against, against_best_low=low)
        for batch, against, low in [(1, None, None), (2, 1.1, 1.09), (4, 1.3, 1.2), (8, 1.2, 1.1)]
    ]
    verdict = judge(state(1000), state(500), change(0.0), latency, LIMITS)
    assert verdict.reason == "at batch 4 1.30 times the time of the original's best float32 form, 1.05 allowed"


class Timed:
    """A session that takes a given number of seconds; remembers what it was asked."""

    def __init__(self, seconds, log=None):
        self.seconds, self.log, self.warm = seconds, log if log is not None else [], []

    def warmup(self, batch):
        self.warm.append(batch)

    def run(self, arrays):
        return {"y": arrays["x"] * 2}


def read(seed, log=None):
    """A clock that reads the session's seconds with 10 % of noise, all upwards, as other programs cause it."""
    rng = np.random.default_rng(seed)

    def seconds(session, rows):
        if log is not None:
            log.append((session, len(rows["x"])))
        return session.seconds * (1 + rng.exponential(0.1))

    return seconds


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
def test_the_ratio_is_seen_with_an_interval_that_holds_it(factor, monkeypatch):
    monkeypatch.setattr(guard, "_thread_seconds", read(1))
    results = compare_latency(Timed(1e-3), Timed(factor * 1e-3), INPUTS, (1, 16))
    assert [item.batch for item in results] == [1, 16]
    for item in results:
        assert item.low <= item.ratio <= item.high
        assert item.low * 0.98 < factor < item.high * 1.02
        assert (item.low > 1) == (factor > 1)
        assert item.before_ms == pytest.approx(1.07, rel=0.05)
        assert item.after_ms == pytest.approx(1.07 * factor, rel=0.05)


def test_the_best_form_is_timed_in_the_same_rounds(monkeypatch):
    monkeypatch.setattr(guard, "_thread_seconds", read(1))
    before, after, best = Timed(1e-3), Timed(3e-3), Timed(2e-3)
    (item,) = compare_latency(before, after, INPUTS, (4,), best=best)
    assert best.warm == [4]
    assert item.ratio == pytest.approx(3, rel=0.05)
    assert item.against_best == pytest.approx(1.5, rel=0.05)
    assert item.against_best * 0.9 < item.against_best_low < item.against_best
    (item,) = compare_latency(before, after, INPUTS, (4,))
    assert (item.against_best, item.against_best_low) == (None, None)


def test_the_same_session_is_rarely_called_different(monkeypatch):
    wrong = 0
    for seed in range(40):
        monkeypatch.setattr(guard, "_thread_seconds", read(seed))
        (item,) = compare_latency(Timed(1e-2), Timed(1e-2), INPUTS, (1,), seed=seed)
        wrong += not item.low <= 1 <= item.high
    assert wrong <= 5, "a 95 % interval misses in 2 of 40"


def test_a_drifting_machine_does_not_favour_either(monkeypatch):
    """The clock slows down by half while it is measured; both sessions meet it, because they take turns."""
    calls = [0]

    def seconds(session, rows):
        calls[0] += 1
        return session.seconds * (1 + calls[0] / 400)

    monkeypatch.setattr(guard, "_thread_seconds", seconds)
    (item,) = compare_latency(Timed(1e-3), Timed(1e-3), INPUTS, (1,))
    assert item.ratio == pytest.approx(1.0, abs=0.01)


def test_sessions_take_turns_and_are_warm(monkeypatch):
    log = []
    monkeypatch.setattr(guard, "_thread_seconds", read(0, log))
    before, after = Timed(0.1), Timed(0.1)
    compare_latency(before, after, INPUTS, (3,), seconds=1.0)
    assert before.warm == after.warm == [3]
    assert {rows for _, rows in log} == {3}
    rounds = [session for session, _ in log[2:]]  # the first run of each says how many rounds there is time for
    assert rounds.count(before) == rounds.count(after) >= 7
    firsts = rounds[::2]
    assert firsts.count(before) in (len(firsts) // 2, -(-len(firsts) // 2)), "each goes first in half of the rounds"


def test_a_clock_that_stands_still_divides_by_nothing(monkeypatch):
    monkeypatch.setattr(guard, "_thread_seconds", lambda session, rows: 0.0)
    (item,) = compare_latency(Timed(0), Timed(0), INPUTS, (1,))
    assert item.ratio == 1.0


def test_a_clock_without_noise_gives_milliseconds_and_as_many_rounds_as_there_is_time_for(monkeypatch):
    log = []
    monkeypatch.setattr(guard, "_thread_seconds", lambda session, rows: log.append(session) or session.seconds)
    (item,) = compare_latency(Timed(0.1), Timed(0.3), INPUTS, (1,), seconds=8.0)
    assert (item.before_ms, item.after_ms, item.ratio) == pytest.approx((100, 300, 3))
    assert 38 <= len(log) <= 44, "20 rounds of two sessions take 8 seconds"


def test_the_real_clock_sees_work():
    class Busy(Timed):
        def run(self, arrays):
            total = 0
            for number in range(self.seconds):
                total += number
            return {"y": np.array([total])}

    (item,) = compare_latency(Busy(2_000), Busy(40_000), INPUTS, (1,), seconds=0.05)
    assert item.low > 3, "twenty times the work; a loaded machine may hide much of it, not all"


class Twofold:
    """y = 2 x, but for what the batch does to it."""

    def __init__(self, spoil=lambda y, batch: y):
        self.spoil = spoil

    def run(self, arrays):
        batch = len(arrays["x"])
        return {"y": self.spoil(arrays["x"] * 2.0, batch), "z": arrays["x"] * 0}


BROKEN = {
    "the last row of a batch": (lambda y, batch: y + 0.01 * (np.arange(batch) == 15)[:, None], "batch 16"),
    "large batches": (lambda y, batch: y * (1 if batch < 256 else 0.9), "batch 256"),
    "NaN in large batches": (lambda y, batch: y if batch < 256 else np.full_like(y, np.nan), "batch 256.*nan"),
    "NaN everywhere": (lambda y, batch: np.full_like(y, np.nan), "batch 1 differ.*nan"),
    "rows get lost": (lambda y, batch: y[:1], "shape"),
}


def problem(session, inputs=INPUTS, limits=LIMITS, change=None, **options):
    """What is wrong with the last batch size that was looked at."""
    return compare_batches(session, inputs, limits, change, runtime="this", **options)[-1].problem


@pytest.mark.parametrize(("spoil", "words"), BROKEN.values(), ids=BROKEN)
def test_outputs_that_depend_on_the_batch_are_found(spoil, words):
    reason = problem(Twofold(spoil))
    assert reason is not None
    assert re.search(words, reason), reason


@pytest.mark.parametrize(
    ("by", "change", "worse", "problem"),
    [
        (2**-15, None, None, None),
        (
            2**-7,
            None,
            None,
            "on this outputs at batch 5 differ from those on this at batch 1 by 0.0078, 0.0001 allowed",
        ),
        (2**-7, 0.01, 0.01, None),
        (2**-7, 0.011, 0.011, "on this at batch 5 it is worse by 0.0110 than on this at batch 1, 0.01 allowed"),
        (math.nan, 0.0, None, "on this outputs at batch 5 differ from those on this at batch 1 by nan"),
    ],
)
def test_a_gap_is_measured_and_what_it_costs(by, change, worse, problem):
    limits = replace(LIMITS, batches=(1, 5, 7))
    seen = []

    def cost(expected, together, rows):
        seen.append((expected["y"][:, 0].tolist(), together["y"][:, 0].tolist(), rows.tolist()))
        return change

    spoilt = Twofold(
        lambda y, batch: y - by if batch == 5 else y
    )  # batch 5 of 12 rows: three batches, the last filled up
    found = compare_batches(spoilt, INPUTS, limits, None if change is None else cost, runtime="this")
    at_5 = found[1]
    assert [item.batch for item in found] == ([1, 5] if problem else [1, 5, 7])
    assert (at_5.runtime, at_5.worse, found[0].gap, found[0].problem) == ("this", worse, 0.0, None)
    assert at_5.gap == pytest.approx(by, nan_ok=True)
    assert at_5.problem is None if problem is None else problem in at_5.problem
    if seen:
        expected, together, rows = seen[0]
        assert rows == [*range(12), 0, 1, 2]
        assert expected == [4.0 * row for row in rows]
        assert together == pytest.approx([4.0 * row - by for row in rows])


def test_a_missing_output_and_one_of_another_shape_are_named():
    class Lost(Twofold):
        def run(self, arrays):
            outputs = super().run(arrays)
            return outputs if len(arrays["x"]) == 1 else {"y": outputs["y"]}

    (_, agreement) = compare_batches(Lost(), INPUTS, LIMITS, runtime="this")
    words = "on this output 'z' has shape None for batches of 16, expected (16, 2)"
    assert agreement == Agreement("this", 16, math.inf, None, words)
    wide = Twofold(lambda y, batch: y if batch == 1 else np.hstack([y, y]))
    assert problem(wide) == "on this output 'y' has shape (16, 4) for batches of 16, expected (16, 2)"


def test_nan_in_the_second_output_is_not_hidden_by_the_first():
    class Second(Twofold):
        def run(self, arrays):
            return {"y": arrays["x"], "z": arrays["x"] * (np.nan if len(arrays["x"]) > 1 else 1)}

    assert problem(Second()) is not None


def off_by(expected, together, rows):
    """A metric's change: how far the outputs are from their right values, on average."""
    right = INPUTS["x"][rows] * 2.0
    return float(np.abs(together["y"] - right).mean() - np.abs(expected["y"] - right).mean())


RUNTIMES = Limits(batches=(1, 16, 64))
ELSEWHERE = ("first", {"y": INPUTS["x"] * 2.0})
SPOILT = {
    "as good everywhere": (lambda y, batch: y, None),
    "differs, but is as good": (lambda y, batch: y + 1e-3, None),
    "wrong at large batches": (
        lambda y, batch: y + (batch == 64),
        r"on second at batch 64 .* worse by 1.0000 .* first",
    ),
    "wrong at all": (lambda y, batch: y + 1, "on second at batch 1 "),
    "NaN": (lambda y, batch: y * (np.nan if batch == 16 else 1), "on second outputs at batch 16 .*nan"),
    "rows lost": (lambda y, batch: y[:1], "on second output 'y' has shape"),
}


@pytest.mark.parametrize(("spoil", "words"), SPOILT.values(), ids=SPOILT)
def test_another_runtime_is_held_against_the_first(spoil, words):
    found = compare_batches(Twofold(spoil), INPUTS, RUNTIMES, off_by, runtime="second", elsewhere=ELSEWHERE)
    problems = [item.problem for item in found if item.problem]
    if words is None:
        assert problems == []
        assert [item.batch for item in found] == [1, 16, 64]
        assert {item.runtime for item in found} == {"second"}
        return
    assert re.search(words, problems[0])
    assert found[-1].problem, "nothing is measured after the first problem"


def test_outputs_that_no_metric_takes_are_a_problem_of_that_runtime():
    def change(expected, together, rows):
        raise EdgekitError("the outputs are not probabilities")

    spoilt = Twofold(lambda y, batch: y + 1)
    found = compare_batches(spoilt, INPUTS, RUNTIMES, change, runtime="second", elsewhere=ELSEWHERE)
    assert found == [Agreement("second", 1, 1.0, None, "on second at batch 1: the outputs are not probabilities")]


def test_tiled_repeats_rows_in_order():
    assert tiled(INPUTS, 14)["x"][:, 0].tolist() == [*range(0, 24, 2), 0, 2]
    assert len(tiled(INPUTS, 1)["x"]) == 1
    with pytest.raises(EdgekitError, match="no rows"):
        tiled({"x": np.zeros((0, 2), np.float32)}, 4)
