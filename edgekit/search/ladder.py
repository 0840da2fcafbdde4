"""The simplest search: narrow the codes of the weights, bit by bit, until the packed file fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgekit.bundle.format import Bundle
from edgekit.bundle.pack import pack
from edgekit.compression.job import Job, Notify
from edgekit.compression.recipe import Step
from edgekit.compression.run import run
from edgekit.errors import EdgekitError

LOWEST_BITS = 2


def narrowed(
    job: Job,
    bundle: Bundle,
    max_size: int,
    work: Path,
    *,
    notify: Notify = lambda message: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Bundle:
    """The bundle if it fits in `max_size` bytes packed, else further clustered from where it stands; an error with the
    best size reached if quality does not allow it. A rung that is rolled back for another reason is stepped over: wide
    codes of a small matrix may take more bytes than they save."""
    steps = list(job.recipe)
    bits = min([encoding.bits for encoding in bundle.encodings().values()], default=9)
    while not bundle.is_graph and len(pack(bundle)) > max_size and bits > LOWEST_BITS:
        bits = min(bits - 1, 8)
        notify(f"{len(pack(bundle)):,} bytes packed, {max_size:,} allowed: clustering to {bits} bits")
        steps = [*steps, Step("cluster", {"bits": bits})]
        bundle = run(replace(job, recipe=steps), work, notify=notify, progress=progress)
        record = bundle.manifest.records[-1]
        loss = record.get("loss", {}).get("value")  # none: the pass failed, or its loss was no number
        if not record["kept"] and (loss is None or loss > job.limits.max_loss):
            break
    if (size := len(pack(bundle))) > max_size:
        raise EdgekitError(
            f"the smallest result within --max-loss {job.limits.max_loss:g} is {size:,} bytes packed, --max-size "
            f"allows {max_size:,}; allow more loss, or prune or distill in a recipe"
        )
    return bundle
