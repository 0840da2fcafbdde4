"""Compress the finalists with the ordinary compressor, on the study's rows and under its guard. A finalist that an
earlier call compressed in the same way is not compressed again, and one that was begun continues after its last
finished pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgekit.bundle.files import write_file
from edgekit.bundle.format import Bundle
from edgekit.compression.recipe import to_table
from edgekit.compression.trials import Constraints
from edgekit.nas.clock import Progress
from edgekit.nas.spec import Compression, Spec
from edgekit.search.compress import carry_out, job_of

COMPRESSED = "compressed"


def compress_finalists(
    spec: Spec, bundles: Mapping[str, Bundle], folder: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Write each compressed bundle into the study's folder, and return what it had before and has now, as JSON, by
    key."""
    found = {}
    for number, (key, bundle) in enumerate(bundles.items()):
        progress("compressing the finalists", number, len(bundles))
        found[key] = _compressed(spec, bundle, folder / COMPRESSED / f"{key}.edge", progress)
    progress("compressing the finalists", len(bundles), len(bundles))
    return found


def _compressed(spec: Spec, bundle: Bundle, path: Path, progress: Progress) -> dict[str, Any]:
    assert spec.compress is not None
    job = job_of(
        bundle, data=spec.score.data, recipe=None if spec.compress.auto else spec.compress.recipe,
        auto=spec.compress.auto, target=spec.limits.target or None, max_loss=spec.compress.max_loss,
        metric="error-rate", objective=spec.compress.objective, batches=(spec.limits.batch,), seed=spec.search.seed,
    )  # fmt: skip
    record = path.with_suffix(".json")
    identity = hashlib.sha256(f"{job.key()} {_settings(spec.compress)}".encode()).hexdigest()
    if path.is_dir() and record.is_file() and (known := _read(record)).get("identity") == identity:
        return {name: value for name, value in known.items() if name != "identity"}
    result = carry_out(
        job, Constraints(spec.compress.max_loss), auto=spec.compress.auto, trials=spec.compress.trials,
        progress=progress,
    )  # fmt: skip
    path.parent.mkdir(exist_ok=True)
    result.save(path, force=True)
    (time,) = result.latency
    values = {
        "bundle": f"{COMPRESSED}/{path.name}",
        "bytes": [result.source_packed_bytes, result.packed_bytes],
        "milliseconds": [time.before_ms, time.after_ms],
        "estimated": job.estimated,
        "accuracy": [1 - result.original.value, 1 - result.quality.value],
        "passes": [
            {"pass": item.name, "kept": item.kept, "reason": item.reason} for item in result.records
        ],
    }  # fmt: skip
    write_file(record, json.dumps({"identity": identity, **values}, indent=1, allow_nan=False).encode())
    return values


def _settings(compress: Compression) -> str:
    return json.dumps({**asdict(compress), "recipe": [to_table(step) for step in compress.recipe]}, sort_keys=True)


def _read(path: Path) -> dict[str, Any]:
    """Return the record of an earlier call; an unreadable one counts as none, and the network is compressed again."""
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}
