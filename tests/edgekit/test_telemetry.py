"""onnxruntime reports to its maker, unless edgekit turns that off before it is imported. The reports begin with files
in the user's cache and in the folder for temporary files, so their absence shows that nothing is sent."""

import os
import subprocess
import sys

import pytest

onnxruntime = pytest.importorskip("onnxruntime")
# seccomp refuses sockets and nothing else, so that the twin writes its files and sends nothing
USE = """
import sys
from pathlib import Path
{first}
import edgekit
from edgekit.importers import confine
confine.REFUSED = {{"socket": confine.REFUSED["socket"]}}
confine._landlock = lambda *arguments: False
confine.confine(Path(sys.argv[1]), memory=8 << 30, seconds=60, file_size=1 << 24)
import onnxruntime
"""
SUPPRESSING = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "ORT_DISABLE_TELEMETRY", "ORT_RUNNING_UNIT_TESTS")


def files_after(tmp_path, first):
    """Return the files that appear in an empty home when a process imports edgekit and then onnxruntime."""
    own = {name: value for name, value in os.environ.items() if name not in SUPPRESSING}
    own |= dict.fromkeys(("HOME", "TMPDIR", "XDG_CACHE_HOME"), str(tmp_path))
    command = [sys.executable, "-c", USE.format(first=first), str(tmp_path)]
    done = subprocess.run(command, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def test_onnxruntime_prepares_no_reports(tmp_path):
    assert files_after(tmp_path, "") == []


def test_a_user_can_allow_the_reports(tmp_path):
    """The twin: without the variable, onnxruntime 1.29 and later prepare them."""
    version = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
    if sys.platform != "linux" or version < (1, 29):
        pytest.skip("onnxruntime reports nothing on this system before version 1.29")
    found = files_after(tmp_path, "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'")
    assert ".ses" in found
