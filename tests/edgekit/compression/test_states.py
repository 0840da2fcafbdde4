"""States between passes: on what their names depend, who may read them, and which are deleted."""

import multiprocessing
import os
import stat
import sys
from dataclasses import replace

import pytest

from edgekit import plugins
from edgekit.bundle.store import open_bundle
from edgekit.compression import states
from edgekit.compression.run import run

PASS = """
from dataclasses import dataclass
from typing import ClassVar
from edgekit.passes.base import Candidate, Change, Pass
from edgekit.passes.cluster import Cluster

@dataclass(frozen=True, slots=True)
class Mine(Pass[Candidate]):
    name: ClassVar[str] = "mine"
    summary: ClassVar[str] = "A pass of another package."

    def plan(self, candidate):
        return [Change("all", "float32", "16 values")]

    def apply(self, candidate, context):
        return Cluster(bits=4, epochs=0).apply(candidate, context)
"""


@pytest.fixture
def write_pass(tmp_path, monkeypatch, register):
    """Return write_pass(text), which installs a pass `mine` of another package, as a new interpreter loads it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(text, module="my_pass"):
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0] == module.split(".")[0]]:
            monkeypatch.delitem(sys.modules, name)
        loaded = __import__(module, fromlist=["Mine"])
        register("edgekit.passes", "mine", loaded.Mine)

    yield write
    for name in ("my_pass", "my_package", "my_package.inner"):
        sys.modules.pop(name, None)


@pytest.fixture
def passes_run(tiny_job, tmp_path):
    """Return passes_run(), which returns the passes of a recipe that are computed and not taken from the cache."""

    def again():
        said = []
        run(tiny_job([("mine", {}), ("quantize", {"bits": 4, "epochs": 0})]), tmp_path / "work", notify=said.append)
        return [line.split(": ")[1] for line in said if line.startswith("pass ")]

    return again


def test_a_pass_that_was_edited_runs_again_and_an_unedited_one_does_not(write_pass, passes_run):
    write_pass(PASS)
    assert passes_run() == ["mine", "quantize"]
    write_pass(PASS)
    assert passes_run() == []
    write_pass(PASS.replace("bits=4", "bits=5"))
    assert passes_run() == ["mine", "quantize"], "the pass after it depends on it"
    write_pass(PASS)
    assert passes_run() == [], "as it was before"


def test_other_modules_of_the_passs_package_count(write_pass, tmp_path):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    write_pass(PASS, "my_package.inner")
    before = states.pass_identity("mine")
    assert states.pass_identity("mine") == before
    (tmp_path / "my_package" / "tables.py").write_text("x = 1")
    assert states.pass_identity("mine") != before


def test_edgekits_own_code_counts(write_pass, tmp_path, monkeypatch):
    write_pass(PASS)
    before = states.pass_identity("mine"), states.pass_identity("cluster")
    fake = tmp_path / "edgekit"
    fake.mkdir()
    (fake / "__init__.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["edgekit"], "__file__", str(fake / "__init__.py"))
        after = states.pass_identity("mine"), states.pass_identity("cluster")
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert before == (states.pass_identity("mine"), states.pass_identity("cluster"))


def test_the_distribution_and_its_version_count(monkeypatch):
    before = states.pass_identity("cluster")
    assert before[0] == "edgekit"
    with monkeypatch.context() as patch:
        patch.setattr(plugins, "distribution", lambda group, name: ("edgekit", "99"))
        assert states.pass_identity("cluster") == ["edgekit", "99", before[2]]
    assert states.pass_identity("cluster") == before


def test_a_pass_without_a_file_is_never_taken_from_the_cache(register):
    space = {"__name__": "typed_in"}
    exec(PASS, space)
    register("edgekit.passes", "mine", space["Mine"])
    assert states.pass_identity("mine") != states.pass_identity("mine")


def test_a_state_is_for_one_user(tiny_bundle, tmp_path):
    path = tmp_path / "a.edge"
    before = os.umask(0)
    try:
        states.keep(path, replace(tiny_bundle, contents={**tiny_bundle.contents, "folder/x": b"x"}))
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in path.rglob("*") if file.is_file()}
    assert modes == {0o600}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path, path / "folder")} == {0o700}


def _keep_often(path, bundle, start, rounds):
    start.wait()
    for _ in range(rounds):
        states.keep(path, bundle)


def test_two_processes_that_write_one_state_leave_a_whole_one(tiny_bundle, tmp_path):
    path, fork = tmp_path / "a.edge", multiprocessing.get_context("fork")
    other = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, name="other"))
    start = fork.Barrier(2)
    writers = [fork.Process(target=_keep_often, args=(path, item, start, 150)) for item in (tiny_bundle, other)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert open_bundle(path).manifest.name in ("tiny", "other")
    assert list(tmp_path.iterdir()) == [path], "nothing is left over"


def test_the_oldest_states_are_deleted_first(tiny_bundle, tmp_path):
    for number, name in enumerate(("old", "middle", "new")):
        states.keep(tmp_path / f"{name}.edge", tiny_bundle)
        os.utime(tmp_path / f"{name}.edge", (number, number))
    size = sum(file.stat().st_size for file in (tmp_path / "new.edge").iterdir())
    states.prune(tmp_path, 2 * size)
    assert {path.stem for path in tmp_path.iterdir()} == {"middle", "new"}
    states.prune(tmp_path, size - 1)
    assert not list(tmp_path.iterdir())
    states.prune(tmp_path / "absent")
