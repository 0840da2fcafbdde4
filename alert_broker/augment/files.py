"""Sets of augmented light curves as files: parts that are written once, so that a stopped run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from alert_broker.augment.augmentation import Augmented
from alert_broker.lightcurve import LightCurves, concatenate
from edgekit.errors import EdgekitError

SETTINGS = "settings.json"
NUMBERS = tuple(item.name for item in fields(Augmented) if item.name != "curves")
POINTS = tuple(item.name for item in fields(LightCurves) if item.name != "bands")


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder of a set, or check that the parts in it were made with these settings."""
    path = folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        path.write_text(json.dumps(settings, indent=1) + "\n")
    elif json.loads(path.read_text()) != settings:
        raise EdgekitError(f"{path}: the parts were made with other settings; choose another folder or delete this one")


def join(parts: Sequence[Augmented]) -> Augmented:
    numbers = (np.concatenate([getattr(part, name) for part in parts]) for name in NUMBERS)
    return Augmented(concatenate(part.curves for part in parts), *numbers)


def save(path: Path, part: Augmented) -> None:
    """Write a part; it appears when it is complete."""
    arrays = {name: getattr(part, name) for name in NUMBERS}
    arrays |= {f"curves.{name}": getattr(part.curves, name) for name in POINTS}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, bands=np.array(part.curves.bands), **arrays)
    unfinished.replace(path)


def load(folder: Path) -> Augmented:
    """Return all parts of a set, in order of their names."""
    paths = sorted(folder.glob("part-*.npz"))
    if not paths:
        raise EdgekitError(f"{folder} holds no parts of an augmented set; run tools/augment_plasticc.py first")
    return join([_load(path) for path in paths])


def _load(path: Path) -> Augmented:
    with np.load(path) as saved:
        bands = tuple(str(name) for name in saved["bands"])
        curves = LightCurves(bands, *(saved[f"curves.{name}"] for name in POINTS))
        return Augmented(curves, *(saved[name] for name in NUMBERS))
