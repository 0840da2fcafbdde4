"""The simplest search: cluster the weights to fewer bits, step by step, until the packed file fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgekit.compression.job import Job, Notify
from edgekit.compression.recipe import Step
from edgekit.compression.result import Result
from edgekit.compression.run import run
from edgekit.errors import EdgekitError

LOWEST_BITS = 2


def narrowed(
    job: Job,
    result: Result,
    max_size: int,
    work: Path,
    *,
    notify: Notify = lambda message: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Result:
    """Return the result if its packed file fits in `max_size` bytes, and otherwise a result that is clustered to fewer
    bits. Raises EdgekitError, with the smallest size reached, if the quality does not allow a result that fits. If a
    step is rolled back for another reason than its loss, the next narrower one is tried: wide codes of a small matrix
    may take more bytes than they save."""
    steps = list(job.recipe)
    bits = min([encoding.bits for encoding in result.bundle.encodings().values()], default=9)
    while not result.bundle.is_graph and result.packed_bytes > max_size and bits > LOWEST_BITS:
        bits = min(bits - 1, 8)
        notify(f"{result.packed_bytes:,} bytes packed, {max_size:,} allowed: clustering to {bits} bits")
        steps = [*steps, Step("cluster", {"bits": bits})]
        result = run(replace(job, recipe=steps), work, notify=notify, progress=progress)
        record = result.records[-1]
        failed = record.loss is None or not record.loss.value <= job.limits.max_loss  # also if the loss is not a number
        if not record.kept and failed:
            break
    if (size := result.packed_bytes) > max_size:
        raise EdgekitError(
            f"the smallest result within --max-loss {job.limits.max_loss:g} is {size:,} bytes packed, --max-size "
            f"allows {max_size:,}; allow more loss, or prune or distill in a recipe"
        )
    return result
