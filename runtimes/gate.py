"""A gate for streams: reuse the last answer while the input has hardly changed.

The idea is StreamDiffusion's stochastic similarity filter (Kodaira et al., arXiv 2312.12491, section 3.4), with its
faults repaired. An input is computed with a probability that grows with its distance from the last computed one. The
draw depends on the stream and the sequence number alone, so a replay decides the same on every machine. At most
`most_skips` inputs in a row are skipped. Every input gets an answer, and a reused one says whose it is. The scale of
distances is calibrated on recorded streams, so that an answer that is reused differs from the one that was saved with a
probability of `eps` at most; calibrate again after each change of the model, as also compression changes answers.

The distance decides what is news. For light curves it must count new detections, because one point of a hundred hardly
moves any norm; for images, `noise_distance` finds a single bright pixel, which a cosine similarity overlooks.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from edgekit.errors import EdgekitError

Value = TypeVar("Value")
Answer = TypeVar("Answer")
Distance = Callable[[Value, Value], float]
SCALES = tuple(2.0 ** (number / 4) for number in range(-60, 61))  # that calibration tries, in units of the distance
MOST_STREAMS = 4096  # whose references are kept; an older stream's next input is computed


@dataclass(frozen=True, slots=True)
class Gate:
    """scale: the distance from which on every input is computed; most_skips: in a row."""

    scale: float
    most_skips: int

    def __post_init__(self) -> None:
        if not 0 < self.scale < math.inf:
            raise EdgekitError(
                f"the gate's scale is {self.scale}; expected a distance above 0, as `calibrate` finds it"
            )
        if self.most_skips < 0:
            raise EdgekitError(f"most_skips = {self.most_skips}; expected 0 or more")

    def admits(self, stream: str, sequence: int, distance: float, skipped: int) -> bool:
        """Return whether an input is computed. distance: from the last one that was; skipped: inputs since then."""
        # a distance that is not a number says nothing about the input, so the input is computed
        return skipped >= self.most_skips or not draw(stream, sequence) >= distance / self.scale


def draw(stream: str, sequence: int) -> float:
    """Return a number from 0 to below 1 that depends on the stream and the sequence number alone."""
    digest = hashlib.sha256(f"{len(stream)}:{stream}:{sequence}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


@dataclass(frozen=True, slots=True)
class Answered(Generic[Answer]):
    """fresh: computed from this input; reused_from: the sequence number whose answer it is otherwise."""

    answer: Answer
    fresh: bool
    reused_from: int | None


@dataclass(slots=True)
class _Reference(Generic[Value, Answer]):
    value: Value
    answer: Answer
    sequence: int  # of the input that was computed
    last: int  # sequence number that was seen
    skipped: int = 0


class GatedModel(Generic[Value, Answer]):
    """A model behind a gate. compute: the model; distance: of two inputs of a stream. Its methods belong to one
    thread."""

    def __init__(
        self, gate: Gate, compute: Callable[[Value], Answer], distance: Distance[Value], streams: int = MOST_STREAMS
    ) -> None:
        self._gate, self._compute, self._distance, self._streams = gate, compute, distance, streams
        self._references: OrderedDict[str, _Reference[Value, Answer]] = (
            OrderedDict()
        )  # the stream that waited most first
        self.computed = self.reused = 0

    def answer(self, stream: str, sequence: int, value: Value) -> Answered[Answer]:
        """Return the answer to an input. Sequence numbers of a stream must increase. If the model raises, the gate is
        as before."""
        reference = self._references.get(stream)
        if reference is not None:
            if sequence <= reference.last:
                raise EdgekitError(
                    f"stream {stream!r}: the input {sequence} comes after {reference.last}; expected increasing numbers"
                )
            distance = self._distance(reference.value, value)
            if not self._gate.admits(stream, sequence, distance, reference.skipped):
                reference.last, reference.skipped = sequence, reference.skipped + 1
                self._references.move_to_end(stream)
                self.reused += 1
                return Answered(reference.answer, fresh=False, reused_from=reference.sequence)
        answer = self._compute(value)
        self._references[stream] = _Reference(value, answer, sequence, sequence)
        self._references.move_to_end(stream)
        if len(self._references) > self._streams:
            self._references.popitem(last=False)
        self.computed += 1
        return Answered(answer, fresh=True, reused_from=None)


def relative_distance(reference: npt.NDArray[Any], value: npt.NDArray[Any]) -> float:
    """Return |value - reference| / |reference|, by the Euclidean norm."""
    first, second = (np.asarray(item, np.float64) for item in (reference, value))
    size = float(np.linalg.norm(first))
    return float(np.linalg.norm(second - first)) / size if size else math.inf


def noise_distance(sigma: float) -> Callable[[npt.NDArray[Any], npt.NDArray[Any]], float]:
    """Return the distance that is the largest change of a pixel, in units of the sensor's noise."""
    if not sigma > 0:
        raise EdgekitError(f"the noise of a pixel is {sigma}; expected a number above 0")

    def distance(reference: npt.NDArray[Any], value: npt.NDArray[Any]) -> float:
        return float(np.max(np.abs(np.asarray(value, np.float64) - np.asarray(reference, np.float64)))) / sigma

    return distance


# --- calibration


@dataclass(frozen=True, slots=True)
class Recorded(Generic[Value, Answer]):
    """A stream with the model's answer to each of its inputs."""

    name: str
    values: Sequence[Value]
    answers: Sequence[Answer]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a gate did on recorded streams. bound: of the share of reused answers that differ, at the confidence."""

    gate: Gate
    inputs: int
    skipped: int
    changed: int
    bound: float


def calibrate(
    streams: Sequence[Recorded[Value, Answer]],
    distance: Distance[Value],
    *,
    eps: float,
    most_skips: int,
    changed: Callable[[Answer, Answer], bool] = lambda first, second: first != second,
    confidence: float = 0.95,
) -> Calibration:
    """Return the gate with the largest scale whose reused answers are wrong with a probability of at most `eps`.

    Scales are tried from the smallest one on that skips enough inputs to prove anything, until the first whose upper
    bound (Clopper and Pearson 1934) is above `eps`; a fixed order needs no correction for the number of trials. The
    bound takes inputs as independent; those of one scene are not, so record many scenes. Raises EdgekitError if no
    scale can be shown to be good: compute every input then, or record more.
    """
    if not (0 < eps < 1 and 0 < confidence < 1):
        raise EdgekitError(f"eps = {eps} and confidence = {confidence}; expected numbers between 0 and 1")
    enough = math.ceil(math.log(1 - confidence) / math.log(1 - eps))
    best: Calibration | None = None
    most = 0
    for scale in SCALES:
        found = replay(streams, distance, Gate(scale, most_skips), changed, confidence)
        most = max(most, found.skipped)
        if found.skipped < enough:
            continue
        if found.bound > eps:
            break
        best = found
    if best is None:
        raise EdgekitError(
            f"no gate is shown to change at most {eps:g} of the answers: up to {most} inputs were skipped, and "
            f"{enough} without a change are needed; record more, allow a larger eps, or compute every input"
        )
    return best


def replay(
    streams: Sequence[Recorded[Value, Answer]],
    distance: Distance[Value],
    gate: Gate,
    changed: Callable[[Answer, Answer], bool] = lambda first, second: first != second,
    confidence: float = 0.95,
) -> Calibration:
    """Return what a gate does on recorded streams."""
    inputs = skipped = wrong = 0
    for stream in streams:
        at = since = 0
        for number in range(1, len(stream.values)):
            if gate.admits(stream.name, number, distance(stream.values[at], stream.values[number]), since):
                at, since = number, 0
            else:
                since += 1
                skipped += 1
                wrong += changed(stream.answers[at], stream.answers[number])
        inputs += len(stream.values)
    return Calibration(gate, inputs, skipped, wrong, upper_bound(wrong, skipped, confidence))


def upper_bound(events: int, trials: int, confidence: float) -> float:
    """Return the largest probability at which no more than so many events are as likely as 1 - confidence."""
    if events >= trials:
        return 1.0
    counts = np.arange(events + 1)
    ways = np.array([math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) for k in counts])
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        terms = ways + counts * math.log(middle) + (trials - counts) * math.log1p(-middle)
        if float(np.exp(terms).sum()) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


# --- queues before and behind the gate


class BoundedQueue(Generic[Value]):
    """A queue between threads with room for `size` items. when_full: "block" makes the producer wait; "latest" drops
    the oldest item, and counts it. Iterating gives the items until the queue is closed and empty."""

    def __init__(self, size: int, when_full: Literal["block", "latest"]) -> None:
        if size < 1:
            raise EdgekitError(f"a queue of {size} items; expected at least 1")
        self._size, self._latest = size, when_full == "latest"
        self._items: deque[Value] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.dropped = 0

    def put(self, item: Value) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._latest or len(self._items) < self._size)
            if self._closed:
                raise EdgekitError("this queue was closed; it takes no more items")
            if len(self._items) == self._size:
                self._items.popleft()
                self.dropped += 1
            self._items.append(item)
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more items; those that are there are still given."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Value]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._items)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
