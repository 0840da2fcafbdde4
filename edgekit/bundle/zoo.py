"""The models that come with edgekit: a bundle and its card each, from the checkout or the installed wheel."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from edgekit.bundle.format import MANIFEST, Bundle, open_bundle
from edgekit.errors import EdgekitError, unknown

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib")


@cache
def folders() -> dict[str, Path]:
    """Model name to folder."""
    checkout = Path(__file__).resolve().parents[2] / "models"
    if checkout.is_dir():
        manifests = sorted(checkout.glob(f"*/{MANIFEST}"))
    else:
        # data files of the wheel land under the prefix, wherever that is for this kind of installation
        try:
            files = distribution("edgekit").files or []
        except PackageNotFoundError:
            files = []
        manifests = [Path(str(file.locate())) for file in files if file.match(f"share/edgekit/models/*/{MANIFEST}")]
        manifests = manifests or sorted(Path(sys.prefix).glob(f"share/edgekit/models/*/{MANIFEST}"))
    return {manifest.parent.name: manifest.parent.resolve() for manifest in manifests}


def resolve(text: str) -> Bundle:
    """The bundle that a command line names: a directory, a packed file, or the name of a model of the zoo."""
    if text in folders() and not Path(text).exists():
        return open_bundle(folders()[text])
    path = Path(text)
    if path.suffix in (".onnx", ".pt2", *PICKLES) and not path.is_dir():
        from edgekit.importers.files import from_file

        return from_file(path)
    if path.exists() or "/" in text or text.endswith((".edge", ".edgepack")):
        return open_bundle(text)
    if not folders():
        raise EdgekitError(f"{text!r} is not a path, and no models are installed with this edgekit; reinstall it")
    raise unknown("model", text, folders(), where="the zoo (and there is no such path)")
