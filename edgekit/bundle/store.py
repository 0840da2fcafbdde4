"""Read a bundle from a directory or a packed file, and write one."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from edgekit.bundle.bounded import LARGEST_TEXT, read_file
from edgekit.bundle.files import refuse_to_overwrite, write_directory, write_file
from edgekit.bundle.format import GOLDEN, GRAPH, MANIFEST, ONNX, WEIGHTS, Bundle, Manifest
from edgekit.bundle.pack import pack, unpack
from edgekit.errors import EdgekitError


def open_bundle(path: str | Path) -> Bundle:
    """Read and verify a bundle directory or a packed file."""
    path = Path(path)
    if path.is_file():
        return replace(unpack(read_file(path), str(path)), path=path)
    if not path.exists():
        raise EdgekitError(f"{path}: no such bundle; `edgekit models` lists those that come with edgekit")
    if not (path / MANIFEST).is_file():
        raise EdgekitError(f"{path}: not a bundle, it holds no {MANIFEST}; a bundle is a directory written by edgekit")
    manifest = Manifest.from_json(read_file(path / MANIFEST, largest=LARGEST_TEXT), f"{path}/{MANIFEST}")
    contents = {}
    for name, expected in manifest.files.items():
        file = path / name
        if not file.resolve().is_relative_to(path.resolve()):
            raise EdgekitError(
                f"{path}/{MANIFEST}: file name {name!r} points outside the bundle; do not trust this bundle"
            )
        if not file.is_file():
            raise EdgekitError(f"{file}: listed in {MANIFEST} but missing; the bundle is incomplete, copy it again")
        contents[name] = read_file(file)
        if (got := hashlib.sha256(contents[name]).hexdigest()) != expected:
            raise EdgekitError(
                f"{file}: SHA-256 is {got[:12]}..., the manifest says {expected[:12]}...; the file was changed "
                "or damaged after the bundle was written, restore it or write the bundle again"
            )
    for needed in (GRAPH if manifest.family == ONNX else WEIGHTS, GOLDEN):
        if needed not in contents:
            raise EdgekitError(f"{path}/{MANIFEST}: lists no {needed}; the bundle is incomplete, write it again")
    return Bundle(manifest, contents, path)


def refuse_to_replace(path: str | Path, force: bool) -> None:
    """Raise if the path is taken and `force` was not given; called before the work starts, not after."""
    if Path(path).exists() and not force:
        raise EdgekitError(f"{path} already exists; choose another name or pass --force to replace it")


def write_packed(bundle: Bundle, path: Path, *, force: bool = False) -> int:
    """Write the bundle as one entropy-coded file, once the file is known to be readable. Returns its bytes."""
    refuse_to_overwrite(path, force)
    content = pack(bundle)
    unpack(content, str(path))
    write_file(path, content)
    return len(content)


def write_bundle(bundle: Bundle, path: str | Path, *, force: bool = False) -> Bundle:
    """Write a new directory and rename it to `path`: after any failure, `path` holds the old bundle or the new one.

    Replacing takes two renames; if the process is killed between them, the old bundle stays next to `path`, as
    .NAME.PROCESS-THREAD.old.
    """
    path = Path(path)
    refuse_to_replace(path, force)
    if path.exists() and not (path / MANIFEST).is_file():
        raise EdgekitError(f"{path} exists and is not a bundle, so --force will not replace it; choose another name")
    write_directory(path, {**bundle.contents, MANIFEST: bundle.manifest.to_json()})
    return replace(bundle, path=path)


def default_name(path: str | Path) -> str:
    """Return the model's name that a path suggests: 'runs/t2-gr.edge' gives 't2-gr'. Bytes that the locale cannot
    decode are read as UTF-8, which a manifest is written in; any others become a replacement character."""
    return Path(path).name.removesuffix(".edge").encode(errors="surrogateescape").decode(errors="replace")
