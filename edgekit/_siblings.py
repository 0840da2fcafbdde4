"""Refuse to run with somebody else's `exporters`, `runtimes` or `alert_broker` in place of ours.

The names are plain, other projects use them (huggingface/exporters, PyPI's runtimes), and pip merges directories
without a word.
"""

from __future__ import annotations

import importlib

from edgekit import __version__
from edgekit.errors import EdgekitError

SIBLINGS = ("exporters", "runtimes", "alert_broker")


def refuse_strangers() -> None:
    """Raise, naming the path, unless every sibling package is this edgekit's own."""
    for name in SIBLINGS:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            raise EdgekitError(
                f"the package {name!r} is missing ({error}); reinstall: pip install --force-reinstall edgekit"
            ) from None
        if getattr(module, "__edgekit__", None) != __version__:
            place = ", ".join(getattr(module, "__path__", ["?"]))  # __file__ is None for a half-deleted package
            raise EdgekitError(
                f"the package {name!r} found at {place} is not edgekit {__version__}'s: another project has its "
                "name; use a fresh virtual environment, uninstall that project, or start from another folder"
            )
