"""The one exception that users see. Every message names the thing, its value, what is allowed and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekitError(Exception):
    """An error that the user can act on; the CLI prints it in one line and exits with 1."""


def unknown(category: str, name: object, allowed: Iterable[object], *, where: str = "") -> EdgekitError:
    """Return the error for a name outside a closed set; it suggests the nearest allowed name, if one is near or
    contains it."""
    names = [str(item) for item in allowed]
    contains = [item for item in names if str(name) and str(name) in item]
    near = difflib.get_close_matches(str(name), names, n=1) or contains
    hint = f"; did you mean {near[0]!r}?" if near else ""
    suffix = f" in {where}" if where else ""
    return EdgekitError(f"unknown {category} {str(name)!r}{suffix}; expected one of: {', '.join(names)}{hint}")


def missing_extra(package: str, extra: str, purpose: str) -> EdgekitError:
    """Return the error for an optional dependency that is not installed, with the command that installs it."""
    return EdgekitError(f"{purpose} needs {package}, which is not installed; run: pip install 'edgekit[{extra}]'")


def printed(name: str) -> str:
    """Return a name from a stranger's file as it may stand in an error: on one line, and not long."""
    return name[:60] if name.isprintable() else repr(name[:60])
