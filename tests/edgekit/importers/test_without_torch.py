"""ONNX files are imported, and run, in a process that has no torch: the extra onnx is enough."""

import subprocess
import sys

import pytest

from tests.edgekit.importers.test_onnx import model_of

BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])
sys.meta_path.insert(0, Absent())
"""


def run(code, *blocked):
    program = BLOCK.format(blocked=set(blocked)) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(model_of().SerializeToString())
    return tmp_path / "model.onnx"


IMPORT = """
from edgekit.cli import main
sys.argv = ["edgekit", "import", {model!r}, "-o", {bundle!r}]
main()
"""
CONFINED = """
import struct
import numpy
from edgekit.importers.onnx import golden_outputs
from edgekit.bundle.tensors import arrays_to_bytes
graph = open({model!r}, "rb").read()
state = dict(state=numpy.array(bytearray(b"{{}}"), "uint8"))
print(len(golden_outputs(struct.pack("<Q", len(graph)) + graph + arrays_to_bytes(state), "model.onnx")))
"""


def test_an_onnx_file_is_imported_without_torch(model, tmp_path):
    done = run(IMPORT.format(model=str(model), bundle=str(tmp_path / "m.edge")), "torch", "transformers", "onnxscript")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "m.edge" / "graph.onnx").is_file()
    inside = run(CONFINED.format(model=str(model)), "torch", "transformers", "onnxscript")
    assert int(inside.stdout) > 0, inside.stderr


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_extra_one_line_says_what_to_install(package, model, tmp_path):
    code = IMPORT if package == "onnx" else CONFINED
    done = run(code.format(model=str(model), bundle=str(tmp_path / "m.edge")), package)
    assert done.returncode != 0
    assert "pip install 'edgekit[onnx]'" in done.stderr
    if package == "onnx":
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
