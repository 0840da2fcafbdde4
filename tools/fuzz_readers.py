"""The readers of files of strangers, for `fuzz_files.py`: valid files, how changed ones are put together, and the call.

Where a format has a checksum or a compressed stream, the harness changes what is inside and seals it again, as an
attacker would."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.bundle.bounded import arrays_from_safetensors, read_file
from edgekit.bundle.encoding import Affine, Palette
from edgekit.bundle.format import GOLDEN, MANIFEST, Bundle, Manifest, assemble
from edgekit.bundle.pack import MAGIC, VERSION, pack
from edgekit.bundle.store import open_bundle
from edgekit.bundle.tensors import TensorSpec, read_arrays

Files = dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Reader:
    """seeds: valid files by name, several sets; write: put a set into a folder and return the path to read; read: the
    call. confined: most of the work runs in the sandbox, which has its own limits."""

    seeds: Callable[[], list[Files]]
    write: Callable[[Files, Path], Path]
    read: Callable[[Path], Any]
    confined: bool = False


def bundle() -> Bundle:
    """A small bundle with each encoding."""
    rng = np.random.default_rng(0)
    encodings = {
        "a": Affine(4, rng.integers(-7, 8, (4, 3)).astype(np.int8), np.full((4, 1), 0.5, np.float32)),
        "b": Palette(2, rng.integers(0, 4, (3, 2)).astype(np.uint8), np.float32([-1, 0, 1, 2])),
    }
    weights = {name: item.decode() for name, item in encodings.items()} | {"c": rng.normal(size=5).astype(np.float32)}
    rows = {"x": np.zeros((2, 3), np.float32)}
    specs = (TensorSpec("x", ("batch", 3)),), (TensorSpec("y", ("batch", 2)),)
    manifest = Manifest("toy", "t2", {"bands": 3}, *specs, classes=("u", "v"), metrics={"m": {"value": 1.5}})
    return assemble(manifest, weights, encodings, (rows, {"y": np.zeros((2, 2), np.float32)}))


def one_file(name: str) -> Callable[[Files, Path], Path]:
    """A set of one file, whatever its name in the set."""

    def write(files: Files, folder: Path) -> Path:
        (folder / name).write_bytes(next(iter(files.values())))
        return folder / name

    return write


def archive(name: str) -> Callable[[Files, Path], Path]:
    """A zip archive of the set."""

    def write(files: Files, folder: Path) -> Path:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as target:
            for member, content in files.items():
                target.writestr(member, content)
        return folder / name

    return write


def members(content: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        return {name: source.read(name) for name in source.namelist()}


def write_bundle(files: Files, folder: Path) -> Path:
    """The files, with a manifest that has their hashes, unless the change made it unreadable."""
    path = folder / "x.edge"
    path.mkdir(exist_ok=True)
    manifest = files[MANIFEST]
    try:
        values = json.loads(manifest)
        for name in values["files"]:
            values["files"][name] = hashlib.sha256(files[name]).hexdigest()
        manifest = json.dumps(values).encode()
    except (ValueError, LookupError, TypeError, RecursionError):
        pass  # the manifest itself is what was changed
    for name, content in (files | {MANIFEST: manifest}).items():
        (path / name).write_bytes(content)
    return path


def bundle_files() -> list[Files]:
    made = bundle()
    return [{**made.contents, MANIFEST: made.manifest.to_json()}]


def read_bundle(path: Path) -> None:
    """As `edgekit inspect` reads it."""
    from edgekit.compression.describe import describe, tensor_rows

    opened = open_bundle(path)
    opened.golden()
    describe(opened)
    tensor_rows(opened)


def packed_parts() -> list[Files]:
    """The streams of a packed file, without their compression where they are one stream."""
    content, at, parts = pack(bundle())[:-32], len(MAGIC) + 1, []
    while at < len(content):
        (size,) = struct.unpack_from("<I", content, at)
        parts.append(content[at + 4 : at + 4 + size])
        at += 4 + size
    return [{"0": zlib.decompress(parts[0]), "1": parts[1], "2": parts[2]}]


def write_packed(files: Files, folder: Path) -> Path:
    streams = [zlib.compress(files["0"]), files["1"], files["2"]]
    body = MAGIC + bytes([VERSION]) + b"".join(struct.pack("<I", len(item)) + item for item in streams)
    (folder / "x.edgepack").write_bytes(body + hashlib.sha256(body).digest())
    return folder / "x.edgepack"


def graphs() -> list[Files]:
    """A product, and a loop with a branch in it."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: Any, dtype: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, dtype, shape)

    stored = [numpy_helper.from_array(np.ones((3, 2), np.float32), "w")]
    product = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "g", [value("x", ["batch", 3])], [value("y", ["batch", 2])], stored,
    )  # fmt: skip
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Neg", ["a"], ["b"])], "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("a", ["batch", 3])],
        [value("still", [], TensorProto.BOOL), value("b", ["batch", 3])],
    )  # fmt: skip
    counts = [numpy_helper.from_array(np.array(3), "trips"), numpy_helper.from_array(np.array(True), "yes")]
    loop = helper.make_graph(
        [helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)],
        "g", [value("x", ["batch", 3])], [value("y", ["batch", 3])], counts,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)]
    made = [helper.make_model(graph, opset_imports=opsets, ir_version=8) for graph in (product, loop)]
    return [{"x.onnx": model.SerializeToString()} for model in made]


def read_onnx(path: Path) -> None:
    from edgekit.importers.onnx import from_onnx

    from_onnx(path.read_bytes(), "x", str(path))


def programs() -> list[Files]:
    import torch

    target = io.BytesIO()
    rows = {"input": {0: torch.export.Dim("rows")}}
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(2, 3),), dynamic_shapes=rows), target)
    return [members(target.getvalue())]


def read_program(path: Path) -> None:
    from edgekit.importers.program import from_program

    from_program(path)


def folders() -> list[Files]:
    """A ViT of two layers, as transformers saves it."""
    import tempfile

    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    with tempfile.TemporaryDirectory() as scratch:
        transformers.ViTForImageClassification(config).save_pretrained(scratch)
        return [{file.name: file.read_bytes() for file in Path(scratch).iterdir()}]


def write_folder(files: Files, folder: Path) -> Path:
    path = folder / "model"
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def read_folder(path: Path) -> None:
    from edgekit.importers.hugging_face import from_hugging_face

    from_hugging_face(path)


def pictures() -> list[Files]:
    from PIL import Image

    image = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
    made = []
    for form in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"):
        target = io.BytesIO()
        image.save(target, form)
        made.append({"x.png": target.getvalue()})
    return made


def write_picture(files: Files, folder: Path) -> Path:
    path = folder / "pictures"
    for part in ("train", "test"):
        (path / part / "a").mkdir(parents=True, exist_ok=True)
        (path / part / "a" / "x.png").write_bytes(files["x.png"])
    return path


def read_pictures(path: Path) -> None:
    from edgekit.data.sources import from_images

    settings = {"id": "image/1", "mean": [0.5] * 3, "std": [0.5] * 3}
    specs = (TensorSpec("image", ("batch", 3, 8, 8)),), (TensorSpec("y", ("batch", 2)),)
    from_images(path, Manifest("x", "onnx", {}, *specs, preprocessing=settings))


def recipes() -> list[Files]:
    text = '[[pass]]\nname = "magnitude_prune"\nsparsity = 0.5\n\n[[pass]]\nname = "quantize"\nbits = 8\nseed = 3\n'
    return [{"x.toml": text.encode()}]


def read_recipe(path: Path) -> None:
    from edgekit.compression import recipe

    recipe.read(path)


def targets() -> list[Files]:
    from edgekit.targets import profile

    folder = Path(profile.__file__).parent / "profiles"
    return [{"tesla-p40.toml": (folder / "tesla-p40.toml").read_bytes()}]


def read_target(path: Path) -> None:
    from edgekit.targets import profile

    profile.read.__wrapped__(path)


READERS = {
    "npz": Reader(lambda: [members(bundle().contents[GOLDEN])], archive("x.npz"), read_arrays),
    "npz-archive": Reader(lambda: [{"x.npz": bundle().contents[GOLDEN]}], one_file("x.npz"), read_arrays),
    "safetensors": Reader(
        lambda: [{"w": bundle().contents["weights.safetensors"]}],
        one_file("x.safetensors"),
        lambda path: arrays_from_safetensors(read_file(path), str(path)),
    ),
    "bundle": Reader(bundle_files, write_bundle, read_bundle),
    "pack": Reader(packed_parts, write_packed, read_bundle),
    "recipe": Reader(recipes, one_file("x.toml"), read_recipe),
    "target": Reader(targets, one_file("tesla-p40.toml"), read_target),
    "image": Reader(pictures, write_picture, read_pictures),
    "onnx": Reader(graphs, one_file("x.onnx"), read_onnx, confined=True),
    "hugging-face": Reader(folders, write_folder, read_folder),
    "pt2": Reader(programs, archive("x.pt2"), read_program, confined=True),
}
