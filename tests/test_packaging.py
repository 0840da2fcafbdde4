"""The wheel: every module and every file that the code reads is in it, and it works away from the checkout."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("edgekit", "exporters", "runtimes", "alert_broker")
DISTRIBUTIONS = {
    "PIL": "pillow",
    "lsst": "lsst_alert_packet",
    "markupsafe": "jinja2",
    "llvmlite": "numba",
    "pynvml": "nvidia_ml_py",
    "optimum": "optimum_onnx",
}  # import name -> what brings it
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked(*folders: str) -> list[str]:
    """Return the files that git tracks or would track; without git, all files."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = done.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = [str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*")]
    return [name for name in names if (ROOT / name).is_file() and "__pycache__" not in name]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy of the tree, without the network."""
    pytest.importorskip("setuptools")
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    names = tracked(*PACKAGES, "models", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    for needed in ("README.md", "LICENSE"):
        (source / needed).touch()
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_every_file_of_the_four_packages_is_in_the_wheel(wheel):
    expected = set(tracked(*PACKAGES))
    assert any(name.endswith("py.typed") for name in expected)
    found = set(zipfile.ZipFile(wheel).namelist())
    assert expected - found == set()
    for package in PACKAGES:
        assert f"{package}/__init__.py" in found
        assert f"{package}/py.typed" in found


def test_every_model_is_in_the_wheel(wheel):
    expected = {name for name in tracked("models") if "/" in name.removeprefix("models/")}
    found = {
        name.split("/share/edgekit/", 1)[1]
        for name in zipfile.ZipFile(wheel).namelist()
        if "/share/edgekit/models/" in name
    }
    assert expected - found == set()


def test_nothing_else_is_in_the_wheel(wheel):
    strangers = [
        name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith(PACKAGES) or name.startswith("tests")
    ]
    assert strangers == []


def test_the_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import sys, edgekit, exporters, runtimes, alert_broker; from edgekit.cli import main; "
        "assert edgekit.__file__.startswith(sys.argv[1]), edgekit.__file__; sys.argv = ['edgekit', '--help']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout


def test_the_version_is_in_one_place():
    from edgekit import __version__

    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "edgekit.__version__"}
    assert "version" in PROJECT["project"]["dynamic"]
    assert __version__.count(".") == 2


def test_every_entry_point_names_something_that_exists():
    import importlib

    for group, points in PROJECT["project"]["entry-points"].items():
        assert group.startswith("edgekit.")
        for name, value in points.items():
            module, _, attribute = value.partition(":")
            found = importlib.import_module(module)
            assert not attribute or hasattr(found, attribute), f"{group} {name}"


def third_party(*folders: str) -> set[str]:
    """Return the top-level names that the code imports and that are neither ours nor Python's."""
    found = set()
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in found - set(PACKAGES) - sys.stdlib_module_names}


def declared(*extras: str) -> set[str]:
    lists = [
        PROJECT["project"]["dependencies"],
        *(PROJECT["project"]["optional-dependencies"][extra] for extra in extras),
    ]
    return {re.split(r"[^\w-]", item)[0].replace("-", "_") for wanted in lists for item in wanted}


def test_every_package_that_is_imported_is_declared():
    """The extra that t2 needs once lacked numba, which was installed only because the alerts need it."""
    every = set(PROJECT["project"]["optional-dependencies"]) - {"all", "dev"}
    extras = ("compress", "prune", "qat", "search", "data", "onnx", "transformers", "doctor", "optimum")
    assert third_party("edgekit") <= declared(*extras)
    assert third_party(*PACKAGES) <= declared(*every)
    assert "numba" not in declared()
    assert "numba" in third_party("edgekit")
