"""Compress a language model: quantise its layers one after another, measure the result, roll back, write a GGUF file.

import edgekit

print(edgekit.llm.compress("model-f16.gguf", "small.gguf", format="Q4_0").quality)
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from edgekit.errors import missing_extra
from edgekit.importers.gguf import Tensor
from edgekit.importers.gguf_write import write_gguf
from runtimes.llm.architecture import Layer, Model
from runtimes.llm.compression.guard import Budget, kept_within
from runtimes.llm.compression.plan import EIGHT, SOURCE, Job, Progress, matrices, of, prepare
from runtimes.llm.compression.result import Compressed, LayerRecord
from runtimes.llm.compression.rounding import fits

FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7}  # as `general.file_type` numbers them
QUANTIZATION_VERSION = 2  # of ggml's block formats


def compress(
    model: str | Path,
    output: str | Path,
    *,
    text: Sequence[str | Path] = (),
    budget: Budget | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
    **settings: Any,
) -> Compressed:
    """Compress a language model to a new GGUF file. model: a .gguf file, or an installed model; text: files for
    calibration and measurement, by default what ships; budget: what the result may lose; settings: those of
    `runtimes.llm.compression.plan.Settings`, such as format="Q4_1". A job that was stopped goes on where it was."""
    job = prepare(model, output, text=text, force=force, **settings)
    return run(job, budget, progress)


def run(job: Job, budget: Budget | None = None, progress: Progress = lambda what, done, total: None) -> Compressed:
    """Compress, measure, roll back what costs too much, and write the file."""
    try:
        from runtimes.llm.compression.quality import layer_damages
        from runtimes.llm.compression.work import Work
    except ModuleNotFoundError as error:
        raise missing_extra(str(error.name), "compress", "the compression of a language model") from None
    started = time.monotonic()
    allowed = budget or Budget()
    work = Work(job, progress)
    formats, sensitivities = work.formats()
    outcome = kept_within(
        allowed,
        work.compressed(formats),
        formats,
        _fallbacks(job),
        lambda: layer_damages(
            work.source, job.model.layers, lambda number: work.layer(number, formats[number]), work.few, progress
        ),
        work.measured,
    )
    reasons = {
        number: f"{form} from the start: in {job.settings.format} it alone diverges by {sensitivities[number]:.4f}"
        for number, form in enumerate(formats)
        if form != job.settings.format
    }
    layers = [work.layer(number, form) for number, form in enumerate(outcome.formats)]
    tensors = _tensors(job, work.model, layers)
    found = Compressed(
        path=job.output,
        source=job.file.path.name,
        source_bytes=job.file.path.stat().st_size,
        bytes=0,
        bits=8 * sum(map(_bytes, layers)) / sum(map(_weights, layers)),
        quality=outcome.quality,
        budget=allowed,
        layers=_records(job, layers, outcome.damages or sensitivities, reasons | outcome.reasons),
        texts=job.texts.sources,
        tokens=sum(map(len, job.texts.calibration)),
        settings=asdict(job.settings),
        seconds=time.monotonic() - started,
    )
    _write(job, found, tensors)
    shutil.rmtree(work.folder, ignore_errors=True)
    return replace(found, bytes=job.output.stat().st_size)


def _fallbacks(job: Job) -> tuple[str, ...]:
    """Return the formats to which a layer may be rolled back, the smallest first."""
    smaller = any(fits(tensor, EIGHT) for layer in job.model.layers for tensor in matrices(layer))
    return (EIGHT, SOURCE) if smaller and job.settings.format != EIGHT else (SOURCE,)


def _tensors(job: Job, model: Model, layers: Sequence[Layer]) -> list[Tensor]:
    """Return the tensors of the result, in the order of the source."""
    changed = {tensor.name: tensor for layer in layers for tensor in of(layer).values()}
    changed |= {tensor.name: tensor for tensor in (model.embedding, model.head)}
    return [changed.get(name, tensor) for name, tensor in job.file.tensors.items()]


def _records(
    job: Job, layers: Sequence[Layer], damages: Sequence[float], reasons: Mapping[int, str]
) -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            number,
            sorted({tensor.format.name for tensor in matrices(layer)}),
            _bytes(source),
            _bytes(layer),
            damages[number] if damages else None,
            reasons.get(number, ""),
        )
        for number, (layer, source) in enumerate(zip(layers, job.model.layers, strict=True))
    )


def _write(job: Job, found: Compressed, tensors: Sequence[Tensor]) -> None:
    """Write the file with the source's metadata, what the formats are, and the report of the compression."""
    report = {name: value for name, value in found.to_json().items() if name not in ("path", "bytes")}
    own = {
        "general.file_type": FILE_TYPES[job.settings.format],
        "general.quantization_version": QUANTIZATION_VERSION,
        "edgekit.compression": json.dumps(report, allow_nan=False),
    }
    write_gguf(job.output, {**job.file.raw, **own}, tensors)


def _bytes(layer: Layer) -> int:
    return sum(tensor.content.size for tensor in of(layer).values())


def _weights(layer: Layer) -> int:
    return sum(math.prod(tensor.shape) for tensor in of(layer).values())
