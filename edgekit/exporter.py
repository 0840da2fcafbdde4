"""The contract of exporters: an exporter makes files of a bundle for a runtime or a device, and proves the files before
they appear."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from edgekit import plugins
from edgekit.errors import EdgekitError, unknown

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgekit.bundle.format import Bundle
    from edgekit.targets.profile import Stack, Target


@dataclass(frozen=True, slots=True)
class Export:
    """The files that an exporter wrote, and their proof.

    files: bytes by name; manifest: the content of manifest.json; checks: one record for each file and batch size.
    """

    directory: Path
    files: dict[str, int]
    manifest: dict[str, Any]
    checks: list[dict[str, Any]]


@runtime_checkable
class Exporter(Protocol):
    """A frozen dataclass whose fields are the export's options; the command line offers them by name."""

    def export(self, bundle: Bundle, directory: str | Path, *, force: bool = False) -> Export:
        """Write the files after the proof that they compute what the model computes. Raises EdgekitError and writes
        nothing if they do not, or if the directory exists and `force` is not given."""
        ...

    @classmethod
    def accepts(cls, model: ModelProto, target: Target, stack: Stack) -> str:
        """Say in one line how the parser of this stack accepts a float32 graph, as an export for the target would write
        it; return "" if this format has no parser of its own. Raises EdgekitError with the parser's reason if it
        refuses the graph."""
        return ""


def export(
    model: str | Path | Bundle,
    directory: str | Path,
    *,
    to: str = "onnx",
    target: str | None = None,
    options: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Export:
    """Write a model for a runtime or a device, once the files are proved to give what the model gives.

    model: as for `edgekit.open`; to: onnx, openvino, tensorrt, tensorrt-rtx or c; target: a device, which decides the
    opset, operators and precision; options: the format's own, such as {"opset": 17}.

    >>> import edgekit, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(edgekit.export("t2-gr", f"{folder}/t2", to="onnx").files)[:2]
    ['golden.npz', 'manifest.json']

    Raises EdgekitError, and writes nothing, if the exported model differs, if the directory exists and `force` is not
    given, and for an option that the format does not take."""
    from edgekit.importers.api import open_to_run

    exporter_class = load_exporter(to)
    given = dict(options or {})
    if target is not None and given.setdefault("target", target) != target:
        raise EdgekitError(f"target = {target!r}, and the options say {given['target']!r}; give the target once")
    if strange := sorted(set(given) - option_names(exporter_class)):
        raise unknown("option", strange[0], sorted(option_names(exporter_class)), where=f"the format {to}")
    return exporter_class(**given).export(open_to_run(model), directory, force=force)


def load_exporter(name: str) -> type[Exporter]:
    """Return the class of an export format by its name, checked against the contract."""
    exporter_class: type[Exporter] = plugins.load("edgekit.exporters", name, problem_with)
    return exporter_class


def option_names(exporter_class: type[Exporter]) -> set[str]:
    """Return the names of the options that an export format takes."""
    return {item.name for item in fields(exporter_class)}  # type: ignore[arg-type]


def problem_with(exporter_class: Any, name: str) -> str:
    """Return why a class is not an exporter; "" if it is one."""
    if not isinstance(exporter_class, type) or not getattr(exporter_class, "__dataclass_params__", None):
        return "it is not a dataclass of options"
    for name_of in ("export", "accepts"):
        if not callable(getattr(exporter_class, name_of, None)):
            return f"it has no method {name_of!r}"
    try:
        method = getattr(exporter_class, "export")  # noqa: B009 - no type of `exporter_class` is known yet
        inspect.signature(method).bind(None, None, "directory", force=True)
    except TypeError as error:
        return f"export is called with (bundle, directory, force=...), and {error}"
    return ""
