"""What holds for every exporter, whatever files it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from edgekit.bundle.format import Bundle, replace_golden
from edgekit.errors import EdgekitError
from edgekit.exporter import Export, Exporter, problem_with


def check_exporter(exporter: Exporter, bundle: Bundle, folder: Path) -> Export:
    """Export a bundle into a new folder below `folder` and check the contract of `edgekit.exporter.Exporter`; returns
    the export. The bundle must be one that the exporter takes."""
    name = type(exporter).__name__
    problem = problem_with(type(exporter), name)
    assert not problem, f"{name} is no exporter: {problem}"
    target = folder / "export"
    result = exporter.export(bundle, target)
    assert isinstance(result, Export), (
        f"{name}: export gave a {type(result).__name__}; expected an edgekit.exporter.Export"
    )
    written = {path.relative_to(target).as_posix(): path.stat().st_size for path in target.rglob("*") if path.is_file()}
    assert written, f"{name}: export has written no file into {target.name}"
    assert result.files == written, f"{name}: Export.files says {result.files}, the folder holds {written}"
    assert result.checks, f"{name}: Export.checks is empty; an export is proved against the model before it is written"
    content = {path: (target / path).read_bytes() for path in written}
    _refuses(exporter, bundle, target, "an existing folder without force")
    kept = {path: (target / path).read_bytes() for path in written}
    assert kept == content, f"{name}: an export that was refused has changed the files that were there"
    exporter.export(bundle, target, force=True)
    _refuses(exporter, damaged(bundle), folder / "damaged", "a bundle whose golden outputs its model does not give")
    left = sorted(path.name for path in folder.iterdir() if path.name != "export")
    assert not left, (
        f"{name}: an export that failed has left {left[0]!r} behind; write to a temporary folder and move it"
    )
    return result


def damaged(bundle: Bundle) -> Bundle:
    """The bundle with golden outputs that its model does not give: each is one larger than it should be."""
    inputs, outputs = bundle.golden()
    wrong = {name: (array + 1).astype(array.dtype) for name, array in outputs.items()}
    broken = replace_golden(bundle, (inputs, wrong))
    return replace(broken, path=None)


def _refuses(exporter: Exporter, bundle: Bundle, target: Path, what: str) -> None:
    try:
        exporter.export(bundle, target)
    except EdgekitError:
        return
    raise AssertionError(f"{type(exporter).__name__}: it took {what}; expected an EdgekitError and no file")
