"""The training loop, for new models, recovery after a pass and distillation: class-balanced, averaged, resumable."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from edgekit.data.dataset import Dataset
from edgekit.errors import EdgekitError

KNOWN = 2**25  # teacher outputs up to this many numbers (128 MB) are kept; more are computed again in each epoch
Progress = Callable[[int, int, float], None]  # epochs done, all epochs, mean loss of the last one
Augment = Callable[[Dataset, np.random.Generator], Dataset]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The parameters of a training run."""

    epochs: int
    batch: int = 64
    learning_rate: float = 3e-3  # peak of a one-cycle schedule; the best of 1e-3, 3e-3, 1e-2 for t2
    weight_decay: float = 1e-2
    clip_norm: float = 1.0  # as in the paper
    # the result is an exponential average of the weights over about 200 steps, fewer at the start
    averaging: float = 0.995
    distillation: float = 0.0  # weight of the teacher's probabilities against the labels


def fit(
    model: nn.Module,
    data: Dataset,
    schedule: Schedule,
    *,
    seed: int,
    teacher: nn.Module | None = None,
    augment: Augment | None = None,
    progress: Progress | None = None,
    checkpoint: Path | None = None,
) -> nn.Module:
    """Train and return the averaged model in evaluation mode. `augment` makes a new training set before each epoch.

    With `checkpoint`, the state is written after every epoch, and a later call with the same arguments continues from
    it.
    """
    if (teacher is None) == (schedule.distillation > 0):
        raise EdgekitError(f"distillation = {schedule.distillation} and a teacher go together; pass both or neither")
    with torch.no_grad():
        example = _first(model.eval()(*tensors(data.take(np.arange(1)))))
    classes = example.shape[-1] if example.ndim == 2 and data.labels.dtype.kind != "f" else 0
    weights = balanced_class_weights(data.labels, classes) if classes else None
    by_label = schedule.distillation < 1  # otherwise the rows need no labels
    model.train()
    averaged = AveragedModel(model, multi_avg_fn=_moving_average(schedule.averaging))
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    total = schedule.epochs * -(-len(data) // schedule.batch)
    rise = 0.1 if total != 10 else 0.2  # a rise of exactly one step divides by zero in torch
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, schedule.learning_rate, total_steps=total, pct_start=rise)
    parts = {"model": model, "averaged": averaged, "optimizer": optimizer, "rate": rate}
    first = _resume(checkpoint, parts, schedule, seed)
    known = None  # the teacher's outputs, if every epoch has the same rows
    if teacher is not None and augment is None and example[0].numel() * len(data) <= KNOWN:
        known = torch.from_numpy(outputs(teacher, data, softmax=[False], batch=schedule.batch)[0])
    for epoch in range(first, schedule.epochs):
        # Randomness depends on seed and epoch alone, so that a resumed run repeats an uninterrupted one.
        rng = np.random.default_rng([seed, epoch])
        torch.manual_seed(int(rng.integers(2**62)))
        epoch_data = augment(data, rng) if augment else data
        loss_sum = 0.0
        for rows in _batches(rng.permutation(len(epoch_data)), schedule.batch):
            batch = epoch_data.take(rows)
            inputs, labels = tensors(batch), torch.from_numpy(batch.labels)
            found = _first(model(*inputs))
            loss = _label_loss(found, labels, weights) if by_label else torch.zeros(())
            if teacher is not None:
                with torch.no_grad():
                    wanted = _first(teacher(*inputs)) if known is None else known[torch.from_numpy(rows)]
                soft = _teacher_loss(found, wanted, labels if by_label else None, weights)
                loss = (1 - schedule.distillation) * loss + schedule.distillation * soft
            if not torch.isfinite(loss):
                raise EdgekitError(
                    f"training diverged in epoch {epoch + 1}: the loss is {loss.item()}; lower the learning rate"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), schedule.clip_norm)
            optimizer.step()
            rate.step()
            averaged.update_parameters(model)
            loss_sum += loss.item() * len(rows)
        _save(checkpoint, parts, schedule, seed, epoch + 1)
        if progress:
            progress(epoch + 1, schedule.epochs, loss_sum / len(epoch_data))
    result: nn.Module = averaged.module
    return result.eval()


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the output on which quality is measured."""
    return output[0] if isinstance(output, tuple) else output


def _label_loss(found: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return the cross-entropy of (samples, classes) logits, or the mean squared error of numbers."""
    if weights is not None:
        return F.cross_entropy(found, labels, weight=weights)
    if labels.is_floating_point():
        return F.mse_loss(found, labels.reshape(found.shape))
    raise EdgekitError(
        f"the network's outputs have shape {tuple(found.shape[1:])} per row, but its data has one class; "
        "leave the labels out to learn from the original model alone"
    )


def _teacher_loss(found: Tensor, wanted: Tensor, labels: Tensor | None, weights: Tensor | None) -> Tensor:
    """Return the distance from the teacher: cross-entropy to its probabilities, or mean squared error for other
    outputs."""
    if weights is None:
        return F.mse_loss(found, wanted)
    # Balanced by sample: class weights on soft targets would pull the result towards weight x probability.
    balance = torch.ones(len(found)) if labels is None else weights[labels]
    soft: Tensor = (F.cross_entropy(found, wanted.softmax(dim=-1), reduction="none") * balance).sum() / balance.sum()
    return soft


def probabilities(model: nn.Module, data: Dataset, *, batch: int = 256) -> npt.NDArray[np.float32]:
    """Return the (samples, classes) softmax outputs of a model in evaluation mode."""
    return outputs(model, data, softmax=[True], batch=batch)[0]


def accuracy(model: nn.Module, data: Dataset) -> float:
    """Return the share of the rows whose largest output is their label's."""
    found = outputs(model, data, softmax=[False])[0]
    return float((found.argmax(axis=1) == data.labels).mean())


@torch.no_grad()
def outputs(
    model: nn.Module, data: Dataset, *, softmax: Sequence[bool], batch: int = 256
) -> list[npt.NDArray[np.float32]]:
    """Return the first outputs of models in evaluation mode, (samples, ...) each; softmax: whether to apply it over the
    last axis, for each."""
    was_training = model.training
    model.eval()
    columns: list[list[Tensor]] = [[] for _ in softmax]
    for part in _batches(np.arange(len(data)), batch):
        raw = model(*tensors(data.take(part)))
        for column, value, soft in zip(columns, raw if isinstance(raw, tuple) else (raw,), softmax, strict=False):
            column.append(value.softmax(dim=-1) if soft else value)
    model.train(was_training)
    return [torch.cat(column).numpy() for column in columns]


def balanced_class_weights(labels: npt.NDArray[np.int64], classes: int) -> Tensor:
    """Return (classes,) weights under which every class counts the same, as in the challenge's metric; 0 for a class
    without samples."""
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    present = counts > 0
    weights = np.where(present, len(labels) / (max(present.sum(), 1) * np.maximum(counts, 1)), 0.0)
    return torch.from_numpy(weights.astype(np.float32))


def tensors(data: Dataset) -> list[Tensor]:
    """Return the inputs in the order in which the network takes them."""
    return [torch.from_numpy(array) for array in data.inputs.values()]


def _moving_average(limit: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Return an exponential average over a tenth of the steps so far, up to `limit`: after a short recovery, a fixed
    0.995 would still give mostly the starting weights."""

    @torch.no_grad()
    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], steps: Tensor | int) -> None:
        done = int(steps)
        for mean, value in zip(averaged, current, strict=True):
            mean.lerp_(value, 1 - min(limit, (1 + done) / (10 + done)))

    return update


def _batches(rows: npt.NDArray[np.integer], size: int) -> Iterable[npt.NDArray[np.integer]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _save(path: Path | None, parts: dict[str, object], schedule: Schedule, seed: int, epoch: int) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    states = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
    torch.save({**states, "epoch": epoch, "schedule": asdict(schedule), "seed": seed}, unfinished)
    unfinished.replace(path)


def _resume(path: Path | None, parts: dict[str, object], schedule: Schedule, seed: int) -> int:
    """Load a checkpoint and return the number of epochs already done."""
    if path is None or not path.is_file():
        return 0
    try:
        saved = torch.load(path, weights_only=True)
        same = saved["schedule"] == asdict(schedule) and saved["seed"] == seed
    except (RuntimeError, LookupError, TypeError, EOFError, pickle.UnpicklingError):
        raise EdgekitError(f"{path}: not a checkpoint of edgekit, or damaged; delete it to start over") from None
    if not same:
        raise EdgekitError(f"{path}: written by a run with another schedule or seed; delete it to start over")
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])  # type: ignore[attr-defined]
    except (RuntimeError, LookupError, ValueError):
        raise EdgekitError(f"{path}: written by a run with another network; delete it to start over") from None
    return int(saved["epoch"])
