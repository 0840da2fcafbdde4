"""A small file that declares a large size is refused before memory is taken, and no other code reads such files."""

import ast
import functools
import hashlib
import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from edgekit.bundle import bounded
from edgekit.bundle.format import GOLDEN, MANIFEST, WEIGHTS
from edgekit.bundle.pack import MAGIC, VERSION, pack, unpack
from edgekit.bundle.store import open_bundle, write_bundle
from edgekit.errors import EdgekitError

ROOT = Path(__file__).resolve().parents[3]
MEMORY = 2 << 30  # bytes of address space that a child may take: the interpreter with numpy takes half a gigabyte


def in_little_memory(code: str, *arguments: object) -> str:
    """Run Python code in a process with a memory limit; return its output. A reader that took the memory that the file
    declares would end with MemoryError, which the code does not catch."""
    limited = f"import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))\n" + code
    command = [sys.executable, "-c", limited, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout.strip()


REFUSED = """
from edgekit.bundle.store import open_bundle
from edgekit.errors import EdgekitError
try:
    bundle = open_bundle(sys.argv[1])
    bundle.golden(), bundle.weights()
except EdgekitError as error:
    print(error)
"""


def reseal(folder: Path, **files: bytes) -> None:
    """Change files of a bundle and their hashes, as an attacker would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, content in files.items():
        name = {"weights": WEIGHTS, "golden": GOLDEN}[name]
        (folder / name).write_bytes(content)
        manifest["files"][name] = hashlib.sha256(content).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def folder(tiny_bundle, tmp_path):
    write_bundle(tiny_bundle, tmp_path / "x.edge")
    return tmp_path / "x.edge"


def with_encoded(folder: Path, table: str, codes: np.ndarray, values: np.ndarray) -> None:
    """Replace the bundle's weights by one encoded tensor."""
    reseal(folder, weights=save_safetensors({"w": codes, f"w#{table}": values}))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"bits": {"w": 8}}))


@pytest.mark.parametrize(
    ("table", "codes", "values"),
    [
        ("scale", np.ones((60_000, 1), np.int8), np.ones((1, 60_000), np.float32)),
        ("scale", np.ones(60_000, np.int8), np.ones((60_000, 1), np.float32)),
        ("palette", np.zeros(60_000, np.uint8), np.ones((1, 60_000), np.float32)),
    ],
)
def test_a_table_that_would_be_broadcast_is_refused(table, codes, values, folder):
    with_encoded(folder, table, codes, values)
    assert f"the {table} has shape {values.shape}" in in_little_memory(REFUSED, folder)


def test_a_table_that_fits_is_decoded(folder):
    with_encoded(folder, "scale", np.ones((6, 2), np.int8), np.full((6, 1), 0.5, np.float32))
    assert (open_bundle(folder).weights()["w"] == 0.5).all()


@pytest.mark.parametrize("bits", [0, 9, 10**9])
def test_a_code_width_that_no_byte_has_is_refused(bits, folder):
    with_encoded(folder, "scale", np.ones((6, 2), np.int8), np.ones((6, 1), np.float32))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"bits": {"w": bits}}))
    with pytest.raises(EdgekitError, match="expected 1 to 8"):
        open_bundle(folder).weights()


def npy_header(shape: str) -> bytes:
    """The start of an .npy file of int8 of this shape."""
    text = f"{{'descr': '|i1', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@functools.cache
def npz_of_zeros(size: int) -> bytes:
    """An .npz with one array of zeros."""
    target = io.BytesIO()
    compressed = zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with compressed as archive, archive.open("a.npy", "w") as member:
        member.write(npy_header(f"({size},)"))
        for start in range(0, size, 1 << 24):
            member.write(bytes(min(1 << 24, size - start)))
    return target.getvalue()


def test_golden_data_that_expands_a_thousand_times_is_refused(folder):
    reseal(folder, golden=npz_of_zeros(300 << 20))
    assert (folder / GOLDEN).stat().st_size < 2_000_000
    found = in_little_memory(REFUSED, folder)
    assert "golden.npz" in found
    assert "314,572,8" in found
    assert "--read-limit" in found


@pytest.mark.parametrize(
    "shape",
    [f"({1 << 40},)", f"(0, {1 << 62}, {1 << 62})", f"({1 << 70}, 0)", "(3,)", "(-1,)", "(True,)", "2", "(1.5,)"],
)
def test_a_shape_that_the_member_does_not_hold_is_refused(shape):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("a.npy", npy_header(shape) + b"ab")
    with pytest.raises(EdgekitError, match=r"x\.npz: not a readable \.npz of plain arrays") as caught:
        bounded.arrays_from_npz(target.getvalue(), "x.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_method_that_numpy_does_not_write_is_refused(method):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        archive.writestr("a.npy", b"")
    with pytest.raises(EdgekitError, match="another method"):
        bounded.arrays_from_npz(target.getvalue(), "x.npz")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (4,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["?", "i1", "<f4", ">f8", "c8", "U3", "S2"])
def test_what_numpy_writes_comes_back(dtype, shape, order):
    array = np.asarray(np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype), order=order)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, a=array, b=array[..., None])
    found = bounded.arrays_from_npz(buffer.getvalue(), "x.npz")
    assert found["a"].dtype == array.dtype
    assert found["a"].tolist() == array.tolist()
    assert found["b"].shape == (*shape, 1)
    assert found["a"].flags.writeable


def sealed(header: dict, *streams: bytes) -> bytes:
    """A packed file of these streams with a valid hash."""
    parts = [zlib.compress(json.dumps(header).encode()), *streams]
    body = MAGIC + bytes([VERSION]) + b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return body + hashlib.sha256(body).digest()


def stream_of(codes: bytes, wide: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = coder.compress(codes) + coder.flush()
    return struct.pack("<I", len(first)) + first + zlib.compress(wide, 9)


def zeros(size: int) -> bytes:
    """A zlib stream that expands to `size` zeros: the same compressed block again and again, and their checksum."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    coder.compress(bytes(1 << 20)), coder.flush(zlib.Z_FULL_FLUSH)
    block = coder.compress(bytes(1 << 20)) + coder.flush(zlib.Z_FULL_FLUSH)
    return b"\x78\xda" + block * (size >> 20) + coder.flush() + struct.pack(">I", size % 65521 << 16 | 1)


HEADER = {
    "name": "x",
    "family": "t2",
    "arguments": {},
    "inputs": [{"name": "a", "shape": ["batch"]}],
    "outputs": [{"name": "b", "shape": ["batch"]}],
}


def bombs() -> dict[str, bytes]:
    """Packed files that would take gigabytes."""
    huge, empty = zeros(3 << 30), stream_of(b"", b"")
    bomb = empty[: -len(zlib.compress(b"", 9))] + huge
    header = {"manifest": HEADER, "weights": {}, "golden": {}}
    declared = {**header, "weights": {"w": ["<f4", (3 << 30) // 4]}}
    wide_body = [huge, empty, empty]
    body = MAGIC + bytes([VERSION]) + b"".join(struct.pack("<I", len(part)) + part for part in wide_body)
    return {
        "weights that the header does not declare": sealed(header, bomb, empty),
        "weights that the header declares": sealed(declared, bomb, empty),
        "the header itself": body + hashlib.sha256(body).digest(),
        "the graph": sealed(
            {**header, "manifest": HEADER | {"family": "onnx"}, "golden": {"in.a": ["<f4", 0], "out.b": ["<f4", 0]}},
            empty,
            empty,
            huge,
        ),
    }


def test_the_bomb_is_one():
    assert zlib.decompress(zeros(5 << 20)) == bytes(5 << 20)


@pytest.mark.parametrize(
    "name",
    ["weights that the header does not declare", "weights that the header declares", "the header itself", "the graph"],
)
def test_a_packed_file_that_expands_a_thousand_times_is_refused(name, tmp_path):
    path = tmp_path / "x.edgepack"
    path.write_bytes(bombs()[name])
    assert path.stat().st_size < 4_000_000
    assert str(path) in in_little_memory(REFUSED, path)


@pytest.mark.parametrize(
    "entry", [["|O", 1], ["<f4", -1], ["<f4", True], ["<f4", 1.5], ["<f4", "3"], ["V9", 1], ["f4,(", 1], ["f4,f4", 1]]
)
def test_a_packed_array_of_odd_type_or_shape_is_refused(entry):
    content = sealed(
        {"manifest": HEADER, "weights": {"w": entry}, "golden": {}}, stream_of(b"", b""), stream_of(b"", b"")
    )
    with pytest.raises(EdgekitError, match=r"x\.edgepack"):
        unpack(content, "x.edgepack")


def test_a_sparse_file_of_a_terabyte_is_not_read(folder):
    with (folder / WEIGHTS).open("r+b") as stream:
        stream.truncate(1 << 40)
    assert "1,099,511,627,776 bytes" in in_little_memory(REFUSED, folder)


def test_a_manifest_of_a_gigabyte_is_not_read(folder):
    with (folder / MANIFEST).open("r+b") as stream:
        stream.truncate(1 << 30)
    assert "edgekit reads up to 33,554,432" in in_little_memory(REFUSED, folder)


def test_a_user_raises_and_lowers_the_limit(tiny_bundle, monkeypatch, edgekit, tmp_path):
    content = npz_of_zeros(300 << 20)
    with pytest.raises(EdgekitError, match=r"314,572,8\d\d bytes in memory"):
        bounded.arrays_from_npz(content, "x.npz")
    monkeypatch.setenv(bounded.VARIABLE, "400 MB")
    assert bounded.arrays_from_npz(content, "x.npz")["a"].nbytes == 300 << 20
    monkeypatch.setenv(bounded.VARIABLE, "1")
    with pytest.raises(EdgekitError, match="takes up to 1 for"):
        unpack(pack(tiny_bundle), "x")
    monkeypatch.setenv(bounded.VARIABLE, "1GB")  # the option replaces it, and pytest restores it
    write_bundle(tiny_bundle, tmp_path / "x.edge")
    assert edgekit("--read-limit", "10", "inspect", tmp_path / "x.edge").failed_with(1, "takes up to 10 for")
    assert edgekit("--read-limit", "much", "inspect", tmp_path / "x.edge").failed_with(
        1, "expected a size such as 20GB"
    )


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("20GB", 20 * 10**9), ("512 MiB", 512 << 20), ("3kb", 3000), (" 2GiB ", 2 << 30)]
)
def test_sizes(text, size):
    assert bounded.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5GB", "GB", "²", "1TB", "9" * 5000])
def test_what_is_no_size(text):
    with pytest.raises(EdgekitError, match="expected a size such as 20GB"):
        bounded.parse_size(text)


# Calls that turn the bytes of a file into memory of another size. Only bounded.py may use them on files of strangers.
READERS = {
    "np.load",
    "np.fromfile",
    "np.memmap",
    "np.frombuffer",
    "zlib.decompress",
    "zlib.decompressobj",
    "gzip.decompress",
    "lzma.decompress",
    "bz2.decompress",
    "zipfile.ZipFile",
    "load_safetensors",
    "safe_open",
    "load_file",
    "torch.load",
    "gzip.open",
    "np.broadcast_to",
}
# module and call: why it is allowed
ALLOWED = {
    ("edgekit/bundle/tensors.py", "zipfile.ZipFile"): "it writes",
    ("edgekit/bundle/pack.py", "np.frombuffer"): "it views bytes that are in memory already, and their size stays",
    ("edgekit/nn/training.py", "torch.load"): "it reads the user's own checkpoint, with weights_only",
    ("edgekit/passes/fold.py", "np.broadcast_to"): "it broadcasts a constant along the axis of a stored weight",
    ("edgekit/passes/smooth_quant.py", "np.broadcast_to"): "it broadcasts to the shape of a scale in memory",
    ("exporters/engine_check.py", "np.load"): "it runs on the device, without edgekit, on the kit's own file",
    ("exporters/device_check.py", "np.load"): "it runs on the device, without edgekit, on the export's own file",
    ("edgekit/importers/program.py", "zipfile.ZipFile"): "it writes",
    ("edgekit/importers/gguf.py", "np.frombuffer"): "it views the mapped file, and it has compared the lengths",
    ("edgekit/importers/safetensors_files.py", "np.frombuffer"): "it views the mapped file, as for GGUF",
    ("runtimes/llm/constraint.py", "np.frombuffer"): "it views a mask in memory, of one bit for each token",
    (
        "runtimes/daemon/tensors.py",
        "np.frombuffer",
    ): "it views a request in memory, and has compared lengths and shapes",
    ("runtimes/llm/tails.py", "np.frombuffer"): "it views bytes that are in memory already, and their size stays",
    ("edgekit/importers/hugging_face.py", "load_file"): "safetensors are not compressed, and the library checks sizes",
    ("edgekit/importers/program.py", "torch.load"): "it runs in the sandbox, with weights_only",
}


def readers(path: Path) -> set[str]:
    """Return the calls of READERS in a file, by any alias of the module."""
    tree = ast.parse(path.read_text())
    found = set()
    aliases = {"numpy": "np"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {item.asname: item.name for item in node.names if item.asname and item.asname != "np"}
        if isinstance(node, ast.ImportFrom):
            aliases |= {
                item.asname or item.name: f"{node.module}.{item.name}".replace("numpy.", "np.", 1)
                for item in node.names
                if node.module in ("numpy", "zlib", "gzip", "lzma", "bz2", "zipfile", "torch")
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, _, rest = ast.unparse(node.func).partition(".")
            name = ".".join(filter(None, [aliases.get(head, head), rest]))
            found |= {name} & READERS
    return found


def strangers(root: Path) -> list[str]:
    return [
        f"{path.relative_to(root)}: {name}"
        for package in ("edgekit", "exporters", "runtimes")
        for path in sorted((root / package).rglob("*.py"))
        for name in sorted(readers(path))
        if path.name != "bounded.py" and (str(path.relative_to(root)), name) not in ALLOWED
    ]


def test_no_other_code_reads_arrays_or_archives():
    assert strangers(ROOT) == []


def test_every_exception_is_still_needed():
    assert [key for key in ALLOWED if key[1] not in readers(ROOT / key[0])] == []


@pytest.mark.parametrize(
    "text",
    [
        "import numpy as np\nnp.load(path)",
        "import numpy\nnumpy.load(path)",
        "from numpy import load as read\nread(path)",
        "import zlib as z\nz.decompress(content)",
        "from zlib import decompress\ndecompress(content)",
        "def f():\n    import torch\n    torch.load(path)",
        "from zipfile import ZipFile\nZipFile(path)",
    ],
)
def test_a_planted_reader_is_caught(text, tmp_path):
    (tmp_path / "edgekit").mkdir()
    (tmp_path / "edgekit" / "x.py").write_text(text)
    assert len(strangers(tmp_path)) == 1
