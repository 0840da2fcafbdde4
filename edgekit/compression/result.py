"""The result of a compression: the compressed bundle and its measurements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from edgekit.bundle.format import Bundle
from edgekit.bundle.pack import pack
from edgekit.compression.guard import Agreement, Latency
from edgekit.compression.metrics import Measurement
from edgekit.compression.record import SEARCH, PassRecord, Summary
from edgekit.compression.trials import SearchRecord
from edgekit.cost.memory import Memory


@dataclass(frozen=True, slots=True)
class Result:
    """The result of `run`. bundle: the compressed model, which also holds the records and the summary; records: of this
    run's passes and of those that the source already had; quality: of the result, in the metric's unit."""

    bundle: Bundle
    source: Bundle
    records: tuple[PassRecord, ...]
    summary: Summary
    quality: Measurement
    search: SearchRecord | None = None

    @property
    def original(self) -> Measurement:
        """Return the quality of the source."""
        return self.summary.original

    @property
    def latency(self) -> tuple[Latency, ...]:
        """Return the time of a call of the source and of the result, for each batch size."""
        return self.summary.latency

    @property
    def agreement(self) -> tuple[Agreement, ...]:
        """Return whether the result is the same model at every batch size, and on every runtime of `agree`."""
        return self.summary.agreement

    @property
    def memory(self) -> Memory | None:
        """Return the memory that the result needs on the target; None without a target."""
        return self.summary.memory

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the result's packed file."""
        return len(pack(self.bundle))

    @property
    def source_packed_bytes(self) -> int:
        """Return the bytes of the source's packed file."""
        return len(pack(self.source))

    def save(self, path: str | Path, *, force: bool = False) -> Bundle:
        """Write the bundle, with its report, to the directory `path`, and return it as it was written.

        A network that was given as a live torch module is written as an ONNX graph, because its Python class cannot be
        built elsewhere. Raises EdgekitError if `path` exists and `force` is not given, or if the graph does not give
        what the network gives."""
        from edgekit.bundle.store import default_name, write_bundle
        from edgekit.compression.report import with_report
        from edgekit.importers.live import portable

        bundle = portable(self.bundle)
        bundle = replace(bundle, manifest=replace(bundle.manifest, name=default_name(path)))
        return write_bundle(with_report(bundle, self.source), path, force=force)

    def report(self, path: str | Path) -> None:
        """Write the report alone, as one HTML file."""
        from edgekit.bundle.files import write_file
        from edgekit.compression.report import render

        write_file(Path(path), render(self.bundle, self.source).encode())

    def __str__(self) -> str:
        lines = [
            f"{record.name}: {'kept' if record.kept else 'rolled back'}: {record.reason}" for record in self.records
        ]
        faster = ", ".join(f"{1 / item.ratio:.2f} at batch {item.batch}" for item in self.latency)
        estimate = f" (an estimate for {self.summary.estimated_on})" if self.summary.estimated_on else ""
        lines += [
            f"{self.source_packed_bytes:,} to {self.packed_bytes:,} bytes packed",
            f"{self.summary.metric}: {self.original} to {self.quality}, change {self.summary.change.value:+.4f}",
            f"times as fast as the original{estimate}: {faster}",
        ]
        return "\n".join(lines)


def with_search(result: Result, search: SearchRecord) -> Result:
    """Return the result, and its bundle, with the search that found its recipe."""
    manifest = result.bundle.manifest
    metrics = {**manifest.metrics, SEARCH: search.to_json()}
    return replace(result, bundle=replace(result.bundle, manifest=replace(manifest, metrics=metrics)), search=search)
