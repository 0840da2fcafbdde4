"""The models that come with edgekit: a bundle and a card for each, from the checkout or the installed wheel."""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from edgekit.bundle.format import MANIFEST


@cache
def folders() -> dict[str, Path]:
    """Return the folder of each model by name."""
    checkout = Path(__file__).resolve().parents[2] / "models"
    if checkout.is_dir():
        manifests = sorted(checkout.glob(f"*/{MANIFEST}"))
    else:
        # pip puts the wheel's data files under the prefix, which depends on the way of installation
        try:
            files = distribution("edgekit").files or []
        except PackageNotFoundError:
            files = []
        manifests = [Path(str(file.locate())) for file in files if file.match(f"share/edgekit/models/*/{MANIFEST}")]
        manifests = manifests or sorted(Path(sys.prefix).glob(f"share/edgekit/models/*/{MANIFEST}"))
    return {manifest.parent.name: manifest.parent.resolve() for manifest in manifests}
