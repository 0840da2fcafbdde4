"""edgekit targets"""

import json
import subprocess
import sys
from pathlib import Path

from edgekit.targets import profile


def test_the_table_has_every_target(edgekit):
    done = edgekit("targets")
    assert done.status == 0
    lines = {line.split()[0]: line.split() for line in done.out.splitlines() if line}
    assert set(profile.names()) <= set(lines)
    assert lines["tesla-p40"] == ["tesla-p40", "24", "346", "11.76", "0.184", "47", "float32"]
    assert lines["jetson-nano"][5] == "-"  # no int8 there


def test_one_target_shows_all_of_its_file(edgekit):
    for name in profile.names():
        target = profile.find(name)
        done = edgekit("targets", name)
        assert done.status == 0
        words = " ".join(done.out.split())
        lines = [line for stack in target.stacks for line in stack.requirements]
        sources = [stack.source for stack in target.stacks]
        reasons = [item.why for item in target.never]
        for said in (target.title, target.plan.reason, *target.notes, *reasons, *sources, *lines):
            assert " ".join(said.split()) in words, said
        assert all(mode.name in words for mode in target.power)


def test_json(edgekit):
    found = json.loads(edgekit("targets", "--json").out)
    assert [item["name"] for item in found] == profile.names()
    one = json.loads(edgekit("targets", "tesla-p40", "--json").out)
    assert one == next(item for item in found if item["name"] == "tesla-p40")
    assert one["rates"]["float16"]["dense"] == {"value": 0.184e12, "source": "CUDA guide: 1/64 of float32 at 6.1"}
    assert one["plan"]["never"] == ["float16", "bfloat16", "float8"]
    assert Path(one["path"]).is_file()


def test_an_unknown_name_lists_what_is_there(edgekit):
    assert edgekit("targets", "tesla-p4").failed_with(1, "unknown target 'tesla-p4'", "jetson-nano", "mean 'tesla-p40'")


def test_a_broken_file_of_ones_own_is_named(edgekit, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = profile.user_folder()
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text('name = "mine"\nmemmory = 3\n')
    done = edgekit("targets", "mine")
    assert done.failed_with(1, str(folder / "mine.toml"), "unknown key 'memmory'", "did you mean 'memory'")


def test_torch_is_not_imported():
    code = (
        "import sys; sys.argv = ['edgekit', 'targets', 'tesla-p40'];\n"
        "import edgekit.cli\n"
        "try: edgekit.cli.main()\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
