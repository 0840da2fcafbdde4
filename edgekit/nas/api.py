"""Search for a network in one call."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import tomli_w

from edgekit.bundle.files import write_file
from edgekit.errors import EdgekitError
from edgekit.nas.clock import Progress
from edgekit.nas.finish import SUMMARY, finish
from edgekit.nas.result import summary
from edgekit.nas.spec import Spec, compression_table, preset_text, read_spec, spec_of
from edgekit.nas.study import SPEC, Study


def _hidden(what: str, done: int, total: int) -> None: ...


def search_network(
    spec: str | Path | Mapping[str, Any] | None,
    output: str | Path,
    *,
    then_compress: str | Path | None = None,
    processes: int | None = None,
    progress: Progress = _hidden,
) -> dict[str, Any]:
    """Search for an image classifier under limits of size, operations or time (see `edgekit search`), and return what
    `report.json` holds: finalists, noise, verdicts, front, effects, measured times.

    spec: a file in TOML, a preset's name, or the tables [space], [limits], [search], [score] and [compress] as a
    mapping; None to continue the study of the folder, to the same result as that of an undisturbed run. output: the
    folder of the study. then_compress: a recipe's file for the finalists, or "auto" to search for one; it is stored
    with the study. processes: networks that are judged at a time, by default one per core; the result does not depend
    on it.

    >>> import edgekit, tempfile
    >>> space = {"name": "hybrid2d", "image": 32, "channels": 1, "classes": 10, "width": [16], "head_dim": [16]}
    >>> tables = {"space": space, "limits": {"macs": 5e6}, "score": {"proxy": "synflow", "keep": [1]}}
    >>> tables["search"] = {"candidates": 2, "generation": 2, "control": False}
    >>> found = edgekit.search_network(tables, tempfile.mkdtemp() + "/study", processes=1)
    >>> found["finalists"][0]["macs"] <= 5e6
    True

    Raises EdgekitError for a mistake in the spec, if the folder holds another study, and if no network keeps the
    limits."""
    folder = Path(output)
    if spec is not None:
        begin(folder, spec, then_compress)
    else:
        spec_in(folder)  # raises if there is none
        if then_compress is not None:
            _write(folder, (folder / SPEC).read_text(encoding="utf-8"), then_compress)
    with closing(Study(spec_in(folder), folder, progress)) as study:
        study.run(processes or len(os.sched_getaffinity(0)))
        return finish(study, progress)


def begin(folder: Path, spec: str | Path | Mapping[str, Any], then_compress: str | Path | None = None) -> None:
    """Write the spec of a new study into its folder. Raises before anything is written."""
    if folder.exists():
        raise EdgekitError(f"{folder} exists; continue it with: edgekit search resume {folder}, or name another folder")
    if isinstance(spec, Mapping):
        spec_of(spec, "the spec")
        text = tomli_w.dumps(spec)
    elif isinstance(spec, str) and not spec.endswith(".toml") and not Path(spec).exists():
        text = preset_text(spec)
    else:
        read_spec(Path(spec))
        text = Path(spec).read_text(encoding="utf-8")
    _write(folder, text, then_compress)


def _write(folder: Path, text: str, then_compress: str | Path | None) -> None:
    if then_compress is not None:
        if "compress" in tomllib.loads(text):
            raise EdgekitError("the spec has a [compress] table; change it there, or leave --then-compress out")
        text += "\n" + tomli_w.dumps({"compress": compression_table(then_compress)})
        spec_of(tomllib.loads(text), "--then-compress")
    write_file(folder / SPEC, text.encode())


def spec_in(folder: Path) -> Spec:
    """Return the spec of a study's folder."""
    if not (folder / SPEC).is_file():
        raise EdgekitError(
            f"{folder} holds no study (no {SPEC}); begin one with: edgekit search run SPEC.toml -o {folder}"
        )
    return read_spec(folder / SPEC)


def report_of(folder: Path) -> dict[str, Any]:
    """Return what a study has found so far: what `report.json` holds, if the study has not gone on since."""
    with closing(Study(spec_in(folder), folder)) as study:
        found = summary(study)
    if (folder / SUMMARY).is_file():
        try:
            written = json.loads((folder / SUMMARY).read_bytes())
            if written["journal"] == found["journal"]:
                return dict(written)
        except (ValueError, TypeError, LookupError):
            raise EdgekitError(
                f"{folder / SUMMARY}: damaged; write it again with: edgekit search resume {folder}"
            ) from None
    return found
