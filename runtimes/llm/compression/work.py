"""The work of a compression: the models that are compared, layer by layer, and the layers that are done."""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgekit import __version__, cache
from edgekit.importers import gguf_encode
from edgekit.importers.gguf import Tensor, read_gguf
from edgekit.importers.gguf_write import write_gguf
from edgekit.passes import gptq
from runtimes.llm.architecture import Layer
from runtimes.llm.compression.forward import LayerEngine, Moments, Window
from runtimes.llm.compression.guard import Quality
from runtimes.llm.compression.plan import EIGHT, FOLDER, SOURCE, Job, Progress, of
from runtimes.llm.compression.quality import compare, layer_damages
from runtimes.llm.compression.quantise import in_format, quantised
from runtimes.llm.compression.rounding import bits, fits, rounded
from runtimes.llm.engine import Ids

OLDEST = 7 * 86_400  # seconds since the last layer of a stopped job
MEASURED_WINDOWS = 1  # of the calibration text, on which the damage of each layer is measured


class Work:
    """A running job. source, candidate: the engines of both models, which differ in the embedding and the head; model:
    the candidate's; folder: of the layers that are done, as GGUF files: they need not stay in memory, and a job that
    was stopped does not do them again."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.progress = job, progress
        window = max(map(len, (*job.texts.calibration, *job.texts.held_out)))
        self.source = LayerEngine(job.model, window)
        ends = [_smaller(tensor, job.settings.head) for tensor in job.ends]
        self.model = replace(job.model, embedding=ends[0], head=ends[-1])
        same = all(new is old for new, old in zip(ends, job.ends, strict=True))
        self.candidate = self.source if same else LayerEngine(self.model, window)
        self.folder = cache.private_folder(cache.folder(FOLDER) / _key(job))
        cache.check_tree(self.folder)
        _prune(self.folder)
        self.few: Sequence[Ids] = job.texts.calibration[:MEASURED_WINDOWS]
        self._expected: list[Window] = []  # the held-out text behind the source's last layer

    def formats(self) -> tuple[list[str], Sequence[float]]:
        """Return the format of each layer, and its sensitivity if that decides: the divergence of the source with this
        layer alone rounded to the nearest."""
        layers, settings = self.job.model.layers, self.job.settings
        found = [settings.format] * len(layers)
        if settings.bits is None:
            return found, ()
        share = (settings.bits - bits(settings.format)) / (bits(EIGHT) - bits(settings.format))
        damages = layer_damages(
            self.source, layers, lambda number: in_format(layers[number], settings.format), self.few, self.progress
        )
        most_sensitive = sorted(range(len(layers)), key=lambda number: -damages[number])
        for number in most_sensitive[: math.floor(share * len(layers) + 1e-9)]:
            found[number] = EIGHT
        return found, damages

    def compressed(self, formats: Sequence[str]) -> Quality:
        """Compress all layers; return the quality of the model that they make. Each layer is calibrated on what the
        compressed layers before it give."""
        self._expected = self.source.begun(self.job.texts.held_out)
        calibration = self.candidate.begun(self.job.texts.calibration)
        held_out = self.candidate.begun(self.job.texts.held_out)
        for number, (source, form) in enumerate(zip(self.job.model.layers, formats, strict=True)):
            layer = self.layer(number, form, calibration)
            self.candidate.run_layer(number, layer, calibration + held_out)
            self.source.run_layer(number, source, self._expected)
            self.progress("layers", number + 1, len(formats))
        return compare((self.source, self._expected), (self.candidate, held_out))

    def measured(self, formats: Sequence[str]) -> Quality:
        """Return the quality of the model with layers in these formats."""
        windows = self.candidate.begun(self.job.texts.held_out)
        for number, form in enumerate(formats):
            self.candidate.run_layer(number, self.layer(number, form), windows)
            self.progress("measuring with layers rolled back", number + 1, len(formats))
        return compare((self.source, self._expected), (self.candidate, windows))

    def layer(self, number: int, form: str, calibration: Sequence[Window] = ()) -> Layer:
        """Return a layer in a format. calibration: the text before this layer, for a method that needs it."""
        layer, settings = self.job.model.layers[number], self.job.settings
        if form == SOURCE:
            return layer
        path = self.folder / f"{number:04}-{form}.gguf"
        if not path.is_file():
            if form != settings.format or settings.method == "nearest":
                done = in_format(layer, form)
            else:
                moments: Moments = {}
                self.candidate.run_layer(number, layer, [window.copy() for window in calibration], moments)
                done = quantised(layer, form, settings.method, moments, self.model.architecture, settings.damping)
            before = of(layer)
            write_gguf(path, {}, [item for role, item in of(done).items() if item is not before[role]], mode=0o600)
        found = read_gguf(path).tensors
        return replace(layer, **{role: found.get(tensor.name, tensor) for role, tensor in of(layer).items()})


def _prune(current: Path) -> None:
    """Delete the layers of jobs that were stopped and not continued for a week."""
    for folder in current.parent.iterdir():
        if folder != current and time.time() - folder.stat().st_mtime > OLDEST:
            shutil.rmtree(folder, ignore_errors=True)


def _smaller(tensor: Tensor, form: str) -> Tensor:
    return rounded(tensor.name, tensor.values(), form) if fits(tensor, form) else tensor


def _key(job: Job) -> str:
    """Return a name for what the compressed layers depend on: the source, the settings, the text, and the code."""
    code = [*Path(__file__).parent.glob("*.py"), *(Path(str(module.__file__)) for module in (gguf_encode, gptq))]
    digest = hashlib.sha256(f"{__version__} {job.settings!r}".encode())
    for path in (job.file.path, *sorted(code)):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    for ids in job.texts.calibration:
        digest.update(ids.tobytes())
    return digest.hexdigest()[:32]
