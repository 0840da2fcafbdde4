"""What a compression of a language model is to do, and whether it can: all that is known before the work starts."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import cache
from edgekit.bundle.files import refuse_to_overwrite
from edgekit.errors import EdgekitError, unknown
from edgekit.importers import downloads
from edgekit.importers.gguf import GgufFile, Tensor, read_gguf
from edgekit.importers.gguf_encode import BLOCK
from edgekit.importers.gguf_write import size
from edgekit.passes.change import Change
from runtimes.llm.architecture import Layer, Model
from runtimes.llm.compression.rounding import FORMS, bits, fits
from runtimes.llm.compression.texts import Texts, texts
from runtimes.llm.source import of_gguf

METHODS = ("nearest", "gptq", "awq", "awq+gptq")
EIGHT, SOURCE = "Q8_0", "the source's format"  # the formats of layers that need more bits
FEWEST_BITS = 8  # of a source: what is stored in fewer was rounded before
# the weights of a layer that rounding and scaling know; all but biases and norms of queries and keys must be there
ROLES = {"attention_norm", "query", "key", "value", "attention_output", "mlp_norm", "gate", "up", "down"}
OPTIONAL = {"query_bias", "key_bias", "value_bias", "query_norm", "key_norm"}
FOLDER = "llm-layers"  # of the cache, for the layers of jobs that are not done
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """format: of the layers' matrices; method: how they are rounded; head: the format of the embedding and the head;
    bits: what a weight of the layers may take on average, so that the most sensitive layers get 8 bits; window, tokens:
    of a window of text, and of the calibration; damping: of GPTQ."""

    format: str = "Q4_0"
    method: str = ""  # that of `default_method`
    head: str = EIGHT
    bits: float | None = None
    window: int = 512
    tokens: int = 4096
    damping: float = 0.01  # the paper's value

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", self.method or default_method(self.format))
        for name, known in (("format", FORMS), ("head", FORMS), ("method", METHODS)):
            if getattr(self, name) not in known:
                raise unknown(f"{name} of a compressed language model", getattr(self, name), known)
        least = bits(self.format)
        if self.bits is not None and not least <= self.bits <= bits(EIGHT):
            raise EdgekitError(
                f"bits = {self.bits:g}; expected {least:g} ({self.format} in all layers) to {bits(EIGHT):g} ({EIGHT})"
            )
        for name, number, fewest in (("window", self.window, 64), ("tokens", self.tokens, 64)):
            if number < fewest:
                raise EdgekitError(f"{name} = {number}; expected {fewest} or more tokens")


def default_method(form: str) -> str:
    """Return how matrices are rounded if nobody says: with 8 bits, rounding to the nearest loses almost nothing."""
    return "nearest" if form == EIGHT else "awq+gptq"


@dataclass(frozen=True, slots=True)
class Job:
    """What is known before the work starts."""

    file: GgufFile
    model: Model
    output: Path
    settings: Settings
    texts: Texts

    @property
    def ends(self) -> tuple[Tensor, ...]:
        """The embedding, and the head if it is another tensor."""
        model = self.model
        return (model.embedding,) if model.head is model.embedding else (model.embedding, model.head)


def prepare(
    model: str | Path, output: str | Path, *, text: Sequence[str | Path] = (), force: bool = False, **settings: Any
) -> Job:
    """Return a job whose every condition was checked: nothing of a long work is lost to a bad argument."""
    try:
        chosen = Settings(**settings)
    except TypeError as error:
        raise EdgekitError(f"compress does not take these settings: {error}") from None
    target = Path(output)
    if target.suffix != ".gguf":
        raise EdgekitError(f"{target}: expected a file name that ends in .gguf, the format that is written")
    refuse_to_overwrite(target, force)
    path = downloads.find(model)
    if path.is_dir():
        raise EdgekitError(f"{path}: is a folder; expected a .gguf file, the format that is written")
    file = read_gguf(path)
    source = of_gguf(file)
    window = min(chosen.window, source.model.architecture.context - 1)
    read = texts(source.tokenizer, [Path(item) for item in text], window, chosen.tokens)
    job = Job(file, source.model, target, chosen, read)
    _check_layers(job)
    _check_source(job)
    _check_room(job)
    return job


def of(layer: Layer) -> dict[str, Tensor]:
    """Return the weights of a layer by role."""
    return {role: tensor for role in Layer.__slots__ if (tensor := getattr(layer, role)) is not None}


def matrices(layer: Layer) -> list[Tensor]:
    return [tensor for tensor in of(layer).values() if len(tensor.shape) == 2]


def plan(job: Job) -> list[Change]:
    """Return what happens to each matrix, before the sensitivity of layers is known."""
    found, ends = [], {tensor.name for tensor in job.ends}
    for tensor in (*job.ends, *(tensor for layer in job.model.layers for tensor in matrices(layer))):
        form = job.settings.head if tensor.name in ends else job.settings.format
        before = f"{tensor.shape} {tensor.format.name}"
        after = form if fits(tensor, form) else f"left in {tensor.format.name}: {_obstacle(tensor, form)}"
        found.append(Change(tensor.name, before, after))
    return found


def _check_layers(job: Job) -> None:
    """Raise if the layers differ from those of Llama and Qwen: scales are folded into what makes a matrix's inputs, and
    that is something else there."""
    found = set(of(job.model.layers[0]))
    if other := sorted((found ^ ROLES) - OPTIONAL):
        what = f"the weight {other[0]!r}" if other[0] in found else f"no weight {other[0]!r}"
        raise EdgekitError(
            f"{job.file.path}: layers of {job.model.architecture.family} have {what}; edgekit compresses those of "
            "the Llama and Qwen families"
        )


def _check_source(job: Job) -> None:
    """Raise if the layers' matrices were rounded to few bits before, or if none of them would become smaller."""
    every = [tensor for layer in job.model.layers for tensor in matrices(layer)]
    few = next((tensor for tensor in every if bits(tensor.format.name) < FEWEST_BITS), None)
    if few is not None:
        raise EdgekitError(
            f"{job.file.path}: {few.name!r} is in {few.format.name}, {bits(few.format.name):g} bits to a weight; "
            "a second rounding would add to that error: start from the model's F16, BF16, F32 or Q8_0 file"
        )
    if not any(fits(tensor, job.settings.format) for tensor in every):
        obstacle = _obstacle(every[0], job.settings.format)
        raise EdgekitError(f"{job.file.path}: no matrix becomes smaller in {job.settings.format}: {obstacle}")


def _obstacle(tensor: Tensor, form: str) -> str:
    if tensor.shape[-1] % BLOCK:
        return f"{tensor.shape[-1]} inputs are no multiple of {BLOCK}"
    return f"{form} takes {bits(form):g} bits per weight, and {tensor.format.name} takes {bits(tensor.format.name):g}"


def _check_room(job: Job) -> None:
    """Raise if a disk has no room for the file, or for the finished layers in the cache."""
    ends = {tensor.name for tensor in job.ends}
    small = {tensor.name for layer in job.model.layers for tensor in matrices(layer)} | ends
    sizes = []
    for tensor in job.file.tensors.values():
        form = job.settings.head if tensor.name in ends else job.settings.format
        bytes_ = math.prod(tensor.shape) * bits(form) / 8 if tensor.name in small and fits(tensor, form) else None
        sizes.append((tensor.name, tensor.shape, tensor.content.size if bytes_ is None else int(bytes_)))
    needed = size(job.file.raw, sizes)
    for folder in (job.output.absolute().parent, cache.folder(FOLDER)):
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise EdgekitError(
                f"{folder}: {free:,} bytes are free, and the result takes about {needed:,}; make room, or choose "
                "another folder" + (" with $EDGEKIT_CACHE" if folder == cache.folder(FOLDER) else "")
            )
