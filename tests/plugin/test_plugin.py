"""Packages of a third party are really installed: one keeps the contracts; the plug-ins of the broken ones are
refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHECKS = """
import json, sys
from pathlib import Path
from edgekit import plugins
from edgekit.errors import EdgekitError
from edgekit.exporter import load_exporter
from edgekit.passes.base import Candidate, Context, load_pass
from edgekit.session import open_session
from edgekit.testing import check_exporter, check_pass, check_session
from tests.conftest import light_curves
from tests.toys import toy_bundle

bundle, data, said = toy_bundle(), light_curves(64, 1), {}
candidate = Candidate(bundle.manifest.family, bundle.manifest.arguments, bundle.model())
check_pass(load_pass("round_to_half")(), candidate, Context(data, bundle.model(), 0))
check_exporter(load_exporter("table")(), bundle, Path(sys.argv[1]))
check_session(plugins.load("edgekit.sessions", "numpy"), bundle)
groups = ("edgekit.passes", "edgekit.exporters", "edgekit.sessions")
found = [name for group in groups for name in plugins.names(group)]
for name, use in {
    "no_base": lambda: load_pass("no_base"),
    "no_export": lambda: load_exporter("no_export"),
    "no_run": lambda: open_session(bundle, "no_run"),
}.items():
    try:
        use()
        said[name] = "was taken"
    except EdgekitError as error:
        said[name] = str(error)
print(json.dumps({"found": found, "said": said}))
"""


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> dict:
    """The output of the checks in an environment with edgekit and both packages."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("plugins")
    site = folder / "site"
    packages = [str(HERE / name) for name in ("good", "broken")]
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--disable-pip-version-check", "--target", str(site), *packages]  # fmt: skip
    done = subprocess.run(install, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "work").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHECKS, str(folder / "work")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_third_partys_package_is_found_and_keeps_the_contracts(checked):
    found = checked["found"]
    assert {"round_to_half", "table", "numpy"} <= set(found)
    assert {"cluster", "onnx", "torch"} <= set(found), "edgekit's own are found beside them"


def test_broken_plugins_are_refused_with_the_reason_and_the_package(checked):
    assert checked["said"] == {
        "no_base": "the pass 'no_base' of broken-package 0.3 cannot be used: it does not derive from "
        "edgekit.passes.base.Pass; correct or uninstall that package",
        "no_export": "the export format 'no_export' of broken-package 0.3 cannot be used: it has no method 'export'; "
        "correct or uninstall that package",
        "no_run": "the runtime 'no_run' of broken-package 0.3 cannot be used: it has no method 'run'; correct or "
        "uninstall that package",
    }
