"""Judge one network: by proxies, or by training it. The same network, rows and seed give the same result, in whichever
process and on however many cores: each judge computes on one thread."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit.bundle.bounded import arrays_from_safetensors, read_file
from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError
from edgekit.nas import proxies, supernet
from edgekit.nas.spec import Score
from edgekit.nas.strategies import draw
from edgekit.nn import hiera
from edgekit.nn.hiera_config import HieraConfig
from edgekit.nn.training import Schedule, accuracy, fit


@dataclass(frozen=True, slots=True)
class Rows:
    """What networks learn from and are judged on; `choosing` are rows of the training part that none learns from."""

    training: Dataset
    choosing: Dataset
    test: Dataset


@dataclass(frozen=True, slots=True)
class Job:
    """One network to judge. epochs: 0 for proxies alone; last: whether the test rows judge it, after it has learned
    from all others; supernet: a file of weights that it inherits instead of learning."""

    arguments: Mapping[str, Any]
    seed: int
    epochs: int = 0
    last: bool = False
    proxies: bool = False
    supernet: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """score: share of the judging rows that are right, None without training; proxies: by name; weights: of the trained
    network, if it was the last rung's."""

    score: float | None
    proxies: Mapping[str, float]
    weights: Mapping[str, np.ndarray[Any, Any]] | None = None


def split(training: Dataset, test: Dataset, share: float, study: str) -> Rows:
    """Set rows of the training part aside for choosing between networks."""
    order = draw(study, "validation").permutation(len(training))
    count = max(1, round(share * len(training)))
    if count >= len(training) or not len(test):
        raise EdgekitError(
            f"{len(training)} training and {len(test)} test rows; a search needs rows to learn from, to choose by "
            f"(validation = {share}) and to judge the last networks"
        )
    return Rows(training.take(np.sort(order[count:])), training.take(np.sort(order[:count])), test)


_rows: Rows | None = None
_score: Score | None = None


def prepare(rows: Rows | None, score: Score) -> None:
    """Set what every job of this process uses, for good: the process belongs to a study."""
    global _rows, _score
    _rows, _score = rows, score
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@contextlib.contextmanager
def prepared(rows: Rows | None, score: Score) -> Iterator[None]:
    """In this block, judge in this process; behind it, the process is as before."""
    global _rows, _score
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.random.get_rng_state()
    _rows, _score = rows, score
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        _rows = _score = None
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
        torch.random.set_rng_state(before[2])


def _end_with(parent: Any) -> None:
    """End this process when the one that started it has ended, however it did: nobody would take its results."""
    parent.join()
    os._exit(1)


def judge(job: Job) -> Judged:
    """Judge a network in this process, which `prepare` has prepared."""
    assert _score is not None
    config = HieraConfig(**job.arguments)
    scores = proxy_scores(config, job.seed, _rows) if job.proxies else {}
    if not job.epochs and not job.supernet:
        return Judged(None, scores)
    assert _rows is not None
    if job.supernet:
        found = supernet.inherited_score(_shared(job.supernet), config, _rows.training, _rows.choosing)
        return Judged(found, scores)
    training, judging = _rows.training, _rows.choosing
    if job.last:
        training, judging = joined(training, judging), _rows.test
    torch.manual_seed(job.seed)
    model = hiera.build(**job.arguments)
    schedule = Schedule(job.epochs, batch=_score.batch, learning_rate=_score.learning_rate)
    try:
        trained = fit(model, training, schedule, seed=job.seed)
    except EdgekitError:  # it diverged: the worst result, and no reason to end a study
        return Judged(0.0, scores)
    right = accuracy(trained, judging)
    weights = None
    if job.last:
        assert isinstance(trained, hiera.Hiera)
        weights = {name: value.numpy().copy() for name, value in hiera.fuse(trained).state_dict().items()}
    return Judged(right, scores, weights)


@functools.lru_cache(1)
def _shared(path: str) -> dict[str, torch.Tensor]:
    arrays = arrays_from_safetensors(read_file(Path(path)), path)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def proxy_scores(config: HieraConfig, seed: int, rows: Rows | None) -> dict[str, float]:
    """Return `jacobian` on training images, or on noise if there are none, and `synflow`."""
    if rows is None:
        shape = (proxies.IMAGES, config.channels, config.image, config.image)
        images = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, np.float32))
    else:
        images = torch.from_numpy(next(iter(rows.training.inputs.values()))[: proxies.IMAGES])
    return {
        "jacobian": proxies.jacobian(config, images, seed),
        "synflow": proxies.synflow(config, seed),
    }


def joined(first: Dataset, second: Dataset) -> Dataset:
    """Return the rows of both, as the last rung learns from them."""
    inputs = {name: np.concatenate([array, second.inputs[name]]) for name, array in first.inputs.items()}
    return Dataset(inputs, np.concatenate([first.labels, second.labels]))
