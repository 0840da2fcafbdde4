"""Print the lowest version of each dependency that pyproject.toml allows, as constraints for pip.

    python tools/minimum_versions.py compress onnx > minimum.txt
    python -m pip install -c minimum.txt -e '.[compress,onnx]' pytest hypothesis

The arguments are extras; the dependencies of the core are always in the list.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def minimum(requirements: Iterable[str]) -> list[str]:
    """Return 'name==version' for each requirement with a lower bound or an exact version."""
    lowest = {}
    for requirement in map(Requirement, requirements):
        bounds = [item.version for item in requirement.specifier if item.operator in (">=", "==", "~=")]
        if not bounds:
            raise SystemExit(f"{requirement}: no lower bound; write {requirement.name}>=VERSION in {PROJECT.name}")
        lowest[requirement.name] = bounds[0]
    return [f"{name}=={version}" for name, version in sorted(lowest.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extras", nargs="*", help="extras of pyproject.toml")
    extras = parser.parse_args().extras
    project = tomllib.loads(PROJECT.read_text())["project"]
    known = project["optional-dependencies"]
    if unknown := sorted(set(extras) - known.keys()):
        raise SystemExit(f"unknown extra {unknown[0]!r}; expected one of: {', '.join(sorted(known))}")
    chosen = [item for extra in extras for item in known[extra] if not item.startswith("edgekit[")]
    print("\n".join(minimum([*project["dependencies"], *chosen])))


if __name__ == "__main__":
    main()
