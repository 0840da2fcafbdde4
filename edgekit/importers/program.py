"""Import programs that torch.export saved (.pt2): the program becomes an ONNX graph."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

from edgekit.bundle.format import Bundle
from edgekit.bundle.tensors import Arrays
from edgekit.errors import EdgekitError, missing_extra
from edgekit.importers.onnx import from_onnx
from edgekit.importers.program_json import checked


def from_program(path: Path, *, golden: Arrays | None = None) -> Bundle:
    """Make a bundle from torch.export's archive: its program becomes an ONNX graph."""
    try:
        import torch
    except ModuleNotFoundError:
        raise missing_extra("torch", "compress", "reading a .pt2 file") from None
    archive = _plain_archive(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(archive)
            exported = torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False)
    except Exception as error:  # torch and its exporter raise many types
        raise EdgekitError(
            f"{path}: torch cannot read it and write it as ONNX: {type(error).__name__}: {error}"
        ) from None
    assert exported is not None
    return from_onnx(exported.model_proto.SerializeToString(), path.stem, str(path), golden=golden)


PLAIN = "save a model of plain tensors with torch.export.save, or export it to ONNX"


# These members are all that an archive of plain tensors holds. torch would run anything else that it loads: pickled
# constants and compiled libraries.
MEMBERS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/\w+|models/\w+\.json|extra/[\w./-]+"
    r"|data/(weights/(weight_\d+|\w+_weights_config\.json)|constants/(tensor_\d+|\w+_constants_config\.json))"
    r"|data/sample_inputs/\w+\.pt"
)


PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def _plain_archive(path: Path) -> io.BytesIO:
    """Write the archive anew from members that were checked, so that torch reads checked members and nothing else.

    torch.export.load unpickles members that the archive marks as pickled, and also sample inputs if its safe reader
    fails.
    """
    import torch

    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as plain:
            names = archive.namelist()
            if len(set(names)) != len(names):
                raise EdgekitError(f"{path}: holds two files of one name; {PLAIN}")
            for item in names:
                name, content = item.partition("/")[2], archive.read(item)
                if not MEMBERS.fullmatch(name):
                    raise EdgekitError(
                        f"{path}: holds {name or item!r}, which torch would run and edgekit does not; {PLAIN}"
                    )
                if name.endswith("_config.json"):
                    for key, entry in json.loads(content).get("config", {}).items():
                        if entry.get("use_pickle") is not False or not PAYLOAD.fullmatch(entry.get("path_name", "")):
                            raise EdgekitError(f"{path}: {key!r} is stored as a pickle, which is never read; {PLAIN}")
                if name.startswith("models/"):
                    content = checked(content, f"{path}: {name}")
                if name.startswith("data/sample_inputs/"):
                    _check_tensors(content, path, name, torch)
                plain.writestr(item, content)
    except (zipfile.BadZipFile, ValueError, AttributeError, NotImplementedError) as error:
        raise EdgekitError(f"{path}: not an archive of torch.export.save ({error}); write it again") from None
    copy.seek(0)
    return copy


def _check_tensors(content: bytes, path: Path, name: str, torch: Any) -> None:
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # if the safe reader fails for any reason, torch would use the unsafe one
        raise EdgekitError(f"{path}: {name} holds more than tensors, which would be run; {PLAIN}") from None
