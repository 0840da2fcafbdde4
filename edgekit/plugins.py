"""Find implementations by entry point, so that the core measures on real runtimes without importing one, and a third
party can add a pass, an exporter or a session in a package of its own."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from edgekit.errors import EdgekitError, unknown

KINDS = {"edgekit.passes": "pass", "edgekit.exporters": "export format", "edgekit.sessions": "runtime"}


def names(group: str) -> list[str]:
    """What is installed in a group, sorted."""
    return sorted(_points(group))


def load(group: str, name: str) -> Any:
    """The object an entry point names."""
    points = _points(group)
    if not points:
        raise EdgekitError(f"no {KINDS[group]} is registered; edgekit is not installed, run: pip install -e '.[all]'")
    if name not in points:
        raise unknown(KINDS[group], name, sorted(points))
    try:
        return points[name].load()
    except ModuleNotFoundError as error:
        raise EdgekitError(
            f"{KINDS[group]} {name!r} needs the package {error.name!r}, which is not installed; "
            "run: pip install 'edgekit[all]'"
        ) from None


def imported(text: str, what: str) -> Any:
    """What 'package.module:name' stands for, found as Python finds modules, the current directory included."""
    module, _, name = text.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise EdgekitError(
            f"{what} {text!r}: {error}; expected package.module:name, importable from here or installed"
        ) from None
    except Exception as error:  # anyone's code: whatever it raises is the user's to see
        raise EdgekitError(f"{what} {text!r}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
