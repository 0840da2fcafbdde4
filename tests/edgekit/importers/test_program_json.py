"""What a hostile program says where torch would run it. Each trap is shown to spring in torch alone."""

import contextlib
import json
import zipfile

import pytest
import torch
from torch import nn

from edgekit.errors import EdgekitError
from edgekit.importers.files import from_file
from edgekit.importers.program_json import checked


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x):
        return self.linear(x).reshape(x.shape[0] * 2, -1).relu().reshape(x.shape[0], -1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A program with sizes that are expressions, as torch writes it: (path, members)."""
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    rows = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    torch.export.save(torch.export.export(Net().eval(), (torch.zeros(8, 6),), dynamic_shapes=rows), path)
    with zipfile.ZipFile(path) as archive:
        return path, {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def planted(saved, tmp_path):
    """planted(change): the path of a program whose JSON was changed."""

    def plant(change):
        _, parts = saved
        name = next(name for name in parts if "/models/" in name)
        program = json.loads(parts[name])
        change(program)
        path = tmp_path / "hostile.pt2"
        with zipfile.ZipFile(path, "w") as archive:
            for other, content in parts.items():
                archive.writestr(other, json.dumps(program).encode() if other == name else content)
        return path

    return plant


def every(value, key):
    """The dictionaries inside a value that have this key with a text in it."""
    if isinstance(value, dict):
        if isinstance(value.get(key), str):
            yield value
        for item in value.values():
            yield from every(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from every(item, key)


def size(text):
    def change(program):
        for entry in every(program["graph_module"]["graph"]["tensor_values"], "expr_str"):
            entry["expr_str"] = text

    return change


def operator(target, *arguments):
    def change(program):
        node = next(node for node in program["graph_module"]["graph"]["nodes"] if "relu" in node["target"])
        inputs = [{"name": "", "arg": {"as_string": item}, "kind": 1} for item in arguments]
        node.update(target=target, inputs=inputs or node["inputs"])

    return change


def guard(text):
    def change(program):
        program["guards_code"] = [text]

    return change


def test_what_torch_writes_is_accepted_and_computes_the_same(saved):
    path, parts = saved
    name = next(name for name in parts if "/models/" in name)
    program = json.loads(parts[name])
    assert len(list(every(program, "expr_str"))) > 3, "the twin: there are sizes to be checked"
    assert json.loads(checked(parts[name], "x"))["guards_code"] == []
    assert from_file(path).manifest.family == "onnx"


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s0', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s65', positive=True, integer=True))",
        "FloorDiv(Add(Symbol('u0', integer=True), Integer(-1)), Integer(4))",
        "2*s0 + 1",
        "Max(1, s0 // 2)",
        "Eq(Mod(s0, 4), 0)",
        "Pow(Symbol('s0', integer=True), Integer(2))",
    ],
)
def test_sizes_are_accepted(text, saved):
    _, parts = saved
    program = json.loads(parts[next(name for name in parts if "/models/" in name)])
    size(text)(program)
    checked(json.dumps(program).encode(), "x")


SIZES = {
    "an import": "[__import__('os').system('true'), Symbol('s31')][1]",
    "an attribute": "Symbol('s0').__class__",
    "another function": "eval('1')",
    "a lambda": "(lambda: 1)()",
    "a keyword of its own": "Symbol('s0', cls=print)",
    "a symbol that is code": "Symbol('s0, x')",
    "text": "'s0'",
    "a power that eats the memory": "10**10**10",
    "a power of a function": "Pow(Integer(10), Pow(Integer(10), Integer(10)))",
    "a number of 400 digits": "9" * 400,
    "a size of a megabyte": "1+" * 500_000 + "1",
    "deep nesting": "(" * 900 + "1" + ")" * 900,
    "nothing": "",
    "a comprehension": "[x for x in (1,)]",
    "a name": "__builtins__",
}


@pytest.mark.parametrize("text", SIZES.values(), ids=SIZES)
def test_a_size_that_is_no_arithmetic_is_refused(text, planted):
    with pytest.raises(EdgekitError, match=r"hostile.pt2: models/\w+\.json: .*(the size|a size has)"):
        from_file(planted(size(text)))


NAMES = {
    "a function of a module of torch's": (operator("torch.os.system", "true"), "not arithmetic on tensors"),
    "a way to any attribute": (operator("_operator.attrgetter", "x"), "not arithmetic on tensors"),
    "an operator that reads files": (operator("torch.ops.aten.from_file.default"), "not arithmetic on tensors"),
    "an extension": (operator("#own:thing"), "not arithmetic on tensors"),
    "no operator": (operator("print"), "not arithmetic on tensors"),
    "code in a keyword": (
        lambda program: program["graph_module"]["graph"]["nodes"][0]["inputs"][0].update(name="a)) or print(1"),
        "no name",
    ),
    "code in a node's name": (
        lambda program: program["graph_module"]["graph"]["nodes"][0].update(name="x\nimport os"),
        "no name",
    ),
    "code in a value's name": (
        lambda program: program["graph_module"]["graph"]["tensor_values"].update({"x; import os": {}}),
        "no name",
    ),
    "a type of its own": (
        lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(
            in_spec='[1, {"type": "os.system", "context": "null", "children_spec": []}]'
        ),
        "expected tuples",
    ),
    "a range of code": (
        lambda program: program["range_constraints"].update({"print(1)": {"min_val": 1, "max_val": 2}}),
        "the size",
    ),
    "no object": (lambda program: program.clear() or program.update(graph_module="x y"), "no name"),
}


@pytest.mark.parametrize(("change", "words"), NAMES.values(), ids=NAMES)
def test_a_name_that_torch_would_run_is_refused(change, words, planted):
    with pytest.raises(EdgekitError, match=words):
        from_file(planted(change))


@pytest.mark.parametrize("content", [b"[1]", b"hello", b"[" * 100_000, b"\xff"])
def test_what_is_no_program_is_one_error(content):
    with pytest.raises(EdgekitError, match=r"torch wrote|not an object"):
        checked(content, "x")


def test_torch_alone_springs_the_traps(planted, tmp_path):
    """The planted failure of this file: without the check, sizes and guards run."""
    sprung = tmp_path / "sprung"

    def springs(change, use=lambda program: None):
        sprung.unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            use(torch.export.load(planted(change)))
        return sprung.exists()

    assert springs(size(f"[__import__('pathlib').Path('{sprung}').touch(), Symbol('s31')][1]"))
    assert springs(
        guard(f"__import__('pathlib').Path('{sprung}').touch() or True"),
        lambda program: program.module()(torch.zeros(8, 6)),
    )
    sprung.unlink()
    from_file(planted(guard(f"__import__('pathlib').Path('{sprung}').touch() or True")))
    assert not sprung.exists(), "guards are left out, and the program is read"
