"""Import programs that torch.export saved (.pt2): the program becomes an ONNX graph."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekit.bundle.bounded import read_file, zip_members
from edgekit.bundle.format import Bundle
from edgekit.bundle.store import default_name
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError, missing_extra
from edgekit.importers import sandbox
from edgekit.importers.onnx import from_onnx
from edgekit.importers.program_json import checked


def from_program(
    path: Path,
    *,
    golden: Arrays | None = None,
    state: Mapping[str, str] | None = None,
    fix: Mapping[str, float] | None = None,
) -> Bundle:
    """Make a bundle from torch.export's archive: its program becomes an ONNX graph, in a confined process."""
    if importlib.util.find_spec("torch") is None:
        raise missing_extra("torch", "compress", "reading a .pt2 file")
    archive = _plain_archive(read_file(path), str(path))
    graph = sandbox.run("edgekit.importers.program:to_onnx", archive, str(path))
    return from_onnx(graph, default_name(path.stem), str(path), golden=golden, state=state, fix=fix)


def to_onnx(archive: bytes, source: str) -> bytes:
    """Return the program of an archive as an ONNX graph."""
    import torch

    for name, content in zip_members(archive, source).items():
        if "/data/sample_inputs/" in name:
            _check_tensors(content, source, name.partition("/")[2], torch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(io.BytesIO(archive))
            exported = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    except Exception as error:  # torch and its exporter raise many types
        reason = " ".join(str(error).split())  # torch's messages have several lines
        raise EdgekitError(
            f"{source}: torch cannot read it and write it as ONNX: {type(error).__name__}: {reason}"
        ) from None
    assert exported is not None
    graph: bytes = exported.model_proto.SerializeToString()
    return graph


PLAIN = "save a model of plain tensors with torch.export.save, or export it to ONNX"


# These members are all that an archive of plain tensors holds. torch would run anything else that it loads: pickled
# constants and compiled libraries.
MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/\w+\.json|extra/[\w./-]+"
    r"|data/(weights/(weight_\d+|\w+_weights_config\.json)|constants/(tensor_\d+|\w+_constants_config\.json))"
    r"|data/sample_inputs/\w+\.pt"
)
PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def _plain_archive(content: bytes, source: str) -> bytes:
    """Write the archive anew from members that were checked, so that torch reads checked members and nothing else.

    torch.export.load unpickles members that the archive marks as pickled.
    """
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(copy, "w") as plain:
            for item, member in zip_members(content, source).items():
                plain.writestr(item, _checked_member(item, member, source))
    except (ValueError, AttributeError, TypeError, NotImplementedError, RecursionError) as error:
        raise EdgekitError(f"{source}: not an archive of torch.export.save ({error}); write it again") from None
    return copy.getvalue()


def _checked_member(item: str, content: bytes, source: str) -> bytes:
    """Return what may be given to torch of one member of the archive."""
    name = item.partition("/")[2]
    if not MEMBERS.fullmatch(name):
        raise EdgekitError(f"{source}: holds {name or item!r}, which torch would run and edgekit does not; {PLAIN}")
    if name.endswith("_config.json"):
        for key, entry in json.loads(content).get("config", {}).items():
            if entry.get("use_pickle") is not False or not PAYLOAD.fullmatch(entry.get("path_name", "")):
                raise EdgekitError(f"{source}: {key!r} is stored as a pickle, which is never read; {PLAIN}")
    return checked(content, f"{source}: {name}") if name.startswith("models/") else content


def _check_tensors(content: bytes, source: str, name: str, torch: Any) -> None:
    """Raise if the sample inputs are more than tensors. torch would then use its unsafe reader."""
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # the safe reader raises many types
        raise EdgekitError(f"{source}: {name} holds more than tensors, which would be run; {PLAIN}") from None
