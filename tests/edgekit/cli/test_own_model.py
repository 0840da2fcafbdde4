"""The README's example of a user's own model works as printed, from the function to the export."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT


def blocks(section: str) -> dict[str, str]:
    text = (ROOT / "README.md").read_text().partition(f"## {section}\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL))


@pytest.mark.examples
def test_the_example_of_the_readme(edgekit, tmp_path, monkeypatch):
    pytest.importorskip("torch_pruning")
    from edgekit.bundle.store import open_bundle
    from edgekit.compression import guard, measure

    noise = np.random.default_rng(0)  # how fast this machine is today is not what is tested
    monkeypatch.setattr(guard, "_thread_seconds", lambda session, rows: session.run(rows) and noise.uniform(0.9, 1.1))
    monkeypatch.setitem(measure.FLOAT_FORMS, "onnxruntime", ({},))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = blocks("Your own model")
    (tmp_path / "my_model.py").write_text(found["python"])
    (tmp_path / "recipe.toml").write_text(found["toml"])
    commands = [shlex.split(line, comments=True) for line in found["sh"].replace("\\\n", " ").splitlines()]
    for command, *arguments in commands:
        if command == "python":
            subprocess.run([sys.executable, *arguments], check=True)
        elif command == "export":
            monkeypatch.setenv(*arguments[0].split("="))
        else:
            done = edgekit(*arguments)
            assert done.status == 0, done.err
            if "--dry-run" in arguments:
                assert "32 of 64 channels" in done.out
    assert (tmp_path / "small-onnx" / "model.onnx").is_file()
    small, whole = open_bundle("small.edge"), open_bundle("my.edge")
    assert small.parameters < 0.3 * whole.parameters
    assert {name: small.manifest.records[0][name] for name in ("pass", "kept")} == {
        "pass": "dependency_prune",
        "kept": True,
    }
    assert small.manifest.records[0]["loss"]["value"] < 0.01
