"""No text of a target or of a bundle becomes a command: each text field in turn holds an attack, and the test reads all
that edgekit writes in a language."""

import ast
import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

import exporters
from edgekit.compression import report
from exporters import kit
from exporters.c_export import CExporter
from exporters.escape import in_c_comment, in_line, in_shell
from exporters.target_graph import DeploymentTarget, TargetGraph, deployment_target, requirements
from exporters.tensorrt_export import build_script
from tests.toys import toy_bundle

ATTACK = "x\ntouch evil\r\n*/ touch evil /* <b onclick=evil> \x1b[31m $(touch evil) `touch evil`' \"; touch evil; '"
SHAPES = {"light_curve": {"min": [1, 12, 2], "opt": [16, 12, 2], "max": [64, 12, 2]}}


def replaced(item, path, value):
    """Return a copy of nested dataclasses and tuples with one text replaced; the copy is not checked."""
    if not path:
        return value
    head, *rest = path
    if isinstance(item, tuple):
        return tuple(replaced(one, rest, value) if n == head else one for n, one in enumerate(item))
    if isinstance(item, dict):
        return {**item, head: replaced(item[head], rest, value)}
    copy = object.__new__(type(item))
    for field in dataclasses.fields(item):
        here = getattr(item, field.name)
        object.__setattr__(copy, field.name, replaced(here, rest, value) if field.name == head else here)
    return copy


def texts(item, path=()):
    """Yield the paths of all texts in nested dataclasses, mappings and tuples."""
    if isinstance(item, str):
        yield path
    elif dataclasses.is_dataclass(item):
        for field in dataclasses.fields(item):
            yield from texts(getattr(item, field.name), (*path, field.name))
    elif isinstance(item, dict):
        for key, value in item.items():
            yield from texts(value, (*path, key))
    elif isinstance(item, tuple):
        for number, value in enumerate(item):
            yield from texts(value, (*path, number))


WHERE = deployment_target("rtx-3060-12gb", "tensorrt", "TensorRT 10")
# a compute capability is read as a number
PATHS = [path for path in texts(WHERE) if path[0] in ("target", "stack") and path[-1] != "compute_capability"]


def commands(script: str) -> list[str]:
    """Return the lines of a script that are no comments."""
    return [line for line in script.splitlines() if line.strip() and not line.startswith("#")]


def test_no_text_of_a_target_becomes_a_line_of_a_script(tmp_path):
    assert len(PATHS) > 40
    honest = commands(build_script(WHERE, "float32", SHAPES, 512, 3, "0" * 64))
    for path in PATHS:
        where: DeploymentTarget = replaced(WHERE, path, ATTACK)
        script = build_script(where, "float32", SHAPES, 512, 3, "0" * 64)
        assert commands(script) == honest, path
        assert not [line for line in requirements(where).decode().splitlines() if line.startswith("touch")], path
        graph = TargetGraph(CExporterGraph, where, "float32", 1e-4)
        text = kit.readme(graph, SHAPES, "sh build.sh", [ATTACK]).decode()
        assert not [line for line in text.splitlines() if line.lstrip().startswith(("touch", "*/"))], path
    (tmp_path / "build.sh").write_text(
        build_script(replaced(WHERE, ("target", "title"), ATTACK), "float32", SHAPES, 1, 3, "")
    )
    subprocess.run(["sh", "-n", tmp_path / "build.sh"], check=True)


class CExporterGraph:
    """As much of a graph as a README needs."""

    class graph:  # noqa: N801
        name = ATTACK
        opset_import = ()

    opset_import = ()


def test_a_name_of_an_input_is_one_word_of_the_script(tmp_path):
    """It runs the script with a trtexec that prints its arguments."""
    profile = {ATTACK: SHAPES["light_curve"]}
    script = build_script(WHERE, "float32", profile, 512, 3, "0" * 64)
    command = script[script.index('"$TRTEXEC" \\\n') :].rpartition("echo")[0]
    fake = tmp_path / "trtexec"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do printf "%s\\0" "$word"; done\n')
    fake.chmod(0o755)
    environment = {"TRTEXEC": str(fake), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sh", "-c", command], capture_output=True, cwd=tmp_path, env=environment, check=True)
    assert f"--minShapes={ATTACK}:1x12x2" in done.stdout.decode().split("\0")
    assert not (tmp_path / "evil").exists()
    subprocess.run(
        ["sh", "-c", command.replace("'", "")], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert (tmp_path / "evil").exists(), "the twin: without the quotes the attack succeeds"


def test_no_text_of_a_bundle_becomes_c():
    bundle = toy_bundle()
    for path in [("name",), ("inputs", 0, "unit"), ("outputs", 0, "unit")]:
        hostile = dataclasses.replace(bundle, manifest=replaced(bundle.manifest, path, ATTACK))
        source = CExporter().source(hostile)
        for text in (source.model, source.header):
            assert "evil" not in re.sub(r"/\*.*?\*/", "", text.replace("\\\n", ""), flags=re.DOTALL), path


def test_no_text_of_a_bundle_becomes_html():
    pytest.importorskip("matplotlib")
    bundle = toy_bundle()
    for path in texts(bundle.manifest):
        if path[0] in ("files", "inputs", "outputs", "family", "arguments"):
            continue
        page = report.render(dataclasses.replace(bundle, manifest=replaced(bundle.manifest, path, ATTACK)), bundle)
        assert "<b onclick" not in page, path
    hostile = dataclasses.replace(bundle, manifest=replaced(bundle.manifest, ("name",), ATTACK))
    assert "&lt;b onclick" in report.render(hostile, hostile), "the twin: the name is on the page"


def test_every_word_of_a_script_is_quoted_by_this_module():
    """Only this module imports shlex, so no exporter quotes words by itself."""
    folder = Path(exporters.__file__).parent
    found = [
        f"{path.name}: {ast.unparse(node)}"
        for path in sorted(folder.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "shlex" in ast.unparse(node) and path.name != "escape.py"
    ]
    assert found == []


@pytest.mark.parametrize("escape", [in_c_comment, in_line, in_shell])
def test_plain_text_stays(escape):
    assert escape("abc") == "abc"


def test_one_line():
    assert in_line("a\r\nb\u2028c\x1bd\0 e") == "a b c d e"
    assert "*/" not in in_c_comment("a*/b?\\\n*/")
