"""Find implementations by entry point. So the core measures on real runtimes without importing one, and a third party
can add a pass, an exporter or a session in a package of its own."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from edgekit import __version__
from edgekit.errors import EdgekitError, unknown

TITLES = {  # of what the entry points of a group name
    "edgekit.passes": "pass",
    "edgekit.exporters": "export format",
    "edgekit.sessions": "runtime",
    "edgekit.families": "model family",
    "edgekit.commands": "command",
    "edgekit.datasets": "provider of data sets",
    "edgekit.engines": "engine of language models",
    "edgekit.jobs": "job",
}
# returns the fault of a plug-in of this name, as words after "cannot be used: "; "" if it keeps the contract
Check = Callable[[Any, str], str]

# the extra that brings a package; `all` brings the others
EXTRAS = {"onnx": "onnx", "onnxruntime": "onnx", "openvino": "openvino", "torch": "compress", "optuna": "search"}


def names(group: str) -> list[str]:
    """Return the sorted names that are installed in a group."""
    return sorted(_points(group))


def load(group: str, name: str, check: Check = lambda found, name: "") -> Any:
    """Return the object that an entry point names, after a check that it keeps the contract of its group.

    Raises EdgekitError in one line that names the plug-in, its distribution, and what is missing.
    """
    points = _points(group)
    if not points:
        raise EdgekitError(f"no {TITLES[group]} is registered; edgekit is not installed, run: pip install -e '.[all]'")
    if name not in points:
        raise unknown(TITLES[group], name, sorted(points))
    point = points[name]
    try:
        found = point.load()
    except EdgekitError:
        raise
    except ModuleNotFoundError as error:
        origin, _ = distribution(group, name)
        install = (
            f"'edgekit[{EXTRAS.get(error.name or '', 'all')}]'"
            if origin in ("", "edgekit")
            else f"--force-reinstall {origin}"
        )
        raise EdgekitError(
            f"{TITLES[group]} {name!r} needs the package {error.name!r}, which is not installed; "
            f"run: pip install {install}"
        ) from None
    except Exception as error:  # a module of a third party may raise anything when it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise refused(group, name, f"{point.value} cannot be loaded: {reason}") from error
    if problem := check(found, name):
        raise refused(group, name, problem)
    return found


def refused(group: str, name: str, problem: str) -> EdgekitError:
    """Return the error for a plug-in that does not keep the contract of its group."""
    origin = " ".join(distribution(group, name)).strip()
    source = f" of {origin}" if origin else ""
    return EdgekitError(
        f"the {TITLES[group]} {name!r}{source} cannot be used: {problem}; correct or uninstall that package"
    )


def distribution(group: str, name: str) -> tuple[str, str]:
    """Return the name and the version of the distribution that registers a plug-in; two empty texts if none does."""
    point = _points(group).get(name)
    return ("", "") if point is None or point.dist is None else (point.dist.name, point.dist.version)


def imported(text: str, what: str) -> Any:
    """Return the object 'package.module:name'. Python's own search for modules finds it, also in the current
    directory."""
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
    except Exception as error:  # the module may raise anything, which the user must see
        raise EdgekitError(f"{what} {text!r}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    return found


def _points(group: str) -> dict[str, EntryPoint]:
    return _installed(group, tuple(_folder_state(folder) for folder in sys.path))


@functools.lru_cache(maxsize=64)
def _installed(group: str, folders: tuple[object, ...]) -> dict[str, EntryPoint]:
    """Read the entry points of every installed distribution, which takes milliseconds; building a network asks for
    them. The cache holds as long as no distribution is added to a folder of `sys.path`, or removed."""
    return {point.name: point for point in entry_points(group=group)}


def _folder_state(folder: str) -> tuple[object, ...]:
    """Return values that change when an entry is added to the folder or removed."""
    try:
        found = Path(folder or ".").stat()
    except OSError:
        return (folder,)
    return folder, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_nlink


SIBLINGS = ("exporters", "runtimes", "alert_broker")


def refuse_strangers() -> None:
    """Raise, naming the path, unless every sibling package is this edgekit's own.

    Other projects use these plain names too (huggingface/exporters, PyPI's runtimes), and pip merges folders that have
    the same name without a warning."""
    for name in SIBLINGS:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise EdgekitError(
                f"the package {name!r} is missing ({error}); reinstall: pip install --force-reinstall edgekit"
            ) from None
        if getattr(module, "__edgekit__", None) != __version__:
            path = ", ".join(getattr(module, "__path__", ["?"]))  # __file__ is None for a half-deleted package
            raise EdgekitError(
                f"the package {name!r} found at {path} is not edgekit {__version__}'s: another project has its "
                "name; use a new virtual environment, uninstall that project, or start from another folder"
            )
