"""The readers of what strangers send, for `fuzz_files.py`: valid files, how changed ones are put together, and the
call.

If a format has a checksum, a compressed stream or a length, the harness changes the content inside and seals it again,
as an attacker would. If edgekit has a command that reads the file and does nothing else, the call runs this command;
otherwise it is the function that the commands call."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_cutouts
import fuzz_gguf
import fuzz_language_folder
import fuzz_stream
import numpy as np
from fuzz_changes import NUMBERS, TEXTS, Files, changed

from edgekit import cli
from edgekit.bundle.bounded import arrays_from_safetensors, read_file
from edgekit.bundle.encoding import Affine, Palette
from edgekit.bundle.format import GOLDEN, MANIFEST, Bundle, Manifest, assemble, assemble_graph
from edgekit.bundle.pack import MAGIC, VERSION, pack
from edgekit.bundle.store import open_bundle
from edgekit.bundle.tensors import TensorSpec, read_arrays

GROUP = cli.edgekit  # the command line; the worker puts its own call in its place
FLOATS = (0.0, -1.0, float("nan"), float("inf"), 1e38, 5e-324)


@dataclass(frozen=True, slots=True)
class Reader:
    """seeds: valid files by name, several sets; write: put a set into a folder and return the path to read; read: the
    call. change: another way to change a set than `fuzz_changes.changed`; allowed: audit events that the reader is
    asked for; memory: bytes that it may take beyond the read limit of the file. The first set is accepted, and the
    others may be files that are refused."""

    seeds: Callable[[], list[Files]]
    write: Callable[[Files, Path], Path]
    read: Callable[[Path], Any]
    change: Callable[[Files, random.Random], Files] = changed
    allowed: tuple[str, ...] = ()
    memory: int = 64 << 20


def command(*arguments: str) -> Callable[[Path], Any]:
    """Return the call of a command of edgekit. FILE and OUTPUT among the arguments stand for paths."""

    def read(path: Path) -> None:
        paths = {"FILE": str(path), "OUTPUT": str(path.parent / "output.edge")}
        GROUP.main([paths.get(item, item) for item in arguments], prog_name="edgekit", standalone_mode=False)

    return read


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


def arrays() -> list[Files]:
    """The arrays, which are then stored as an archive; and an archive as it is."""
    content = bundle().contents[GOLDEN]
    return [members(content), {"x.npz": content}]


def write_arrays(files: Files, folder: Path) -> Path:
    return (one_file if "x.npz" in files else archive)("x.npz")(files, folder)


def members(content: bytes) -> Files:
    with zipfile.ZipFile(io.BytesIO(content)) as source:
        return {name: source.read(name) for name in source.namelist()}


def write_bundle(files: Files, folder: Path) -> Path:
    """The files, with a manifest that has their hashes, unless the change made it unreadable. Members of the golden
    rows become an archive."""
    path = folder / "x.edge"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    golden = {name.partition("/")[2]: content for name, content in files.items() if "/" in name}
    files = {name: content for name, content in files.items() if "/" not in name}
    if golden:
        files[GOLDEN] = archive(GOLDEN)(golden, folder).read_bytes()
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


def graph_bundle() -> Bundle:
    """A small bundle of an ONNX graph, whose product has weights that a packed file stores without the graph."""
    rows = {"x": np.zeros((2, 3), np.float32)}, {"y": np.zeros((2, 4), np.float32)}
    specs = (TensorSpec("x", ("batch", 3)),), (TensorSpec("y", ("batch", 4)),)
    return assemble_graph(Manifest("graph", "onnx", {}, *specs), graphs()[0]["x.onnx"], rows)


def bundle_files() -> list[Files]:
    """Bundles whose golden rows are apart, and one as it is."""
    made: list[Files] = []
    for source in (bundle(), graph_bundle()):
        files = {**source.contents, MANIFEST: source.manifest.to_json()}
        apart = {f"{GOLDEN}/{name}": content for name, content in members(files[GOLDEN]).items()}
        made.append({name: content for name, content in files.items() if name != GOLDEN} | apart)
    return [*made, files]


def read_bundle(path: Path) -> None:
    """`edgekit inspect` in one of its forms, and the golden rows, which it does not read."""
    forms = (["--weights"], ["--weights", "--json"], ["--lineage"])
    content = (path / MANIFEST if path.is_dir() else path).read_bytes()
    command("inspect", *forms[zlib.crc32(content) % len(forms)], "FILE")(path)
    open_bundle(path).golden()


def packed_parts() -> list[Files]:
    """The parts of packed files before they were compressed: the manifest, codes and planes of the weights, those of
    the golden rows, and the graph. And the streams of one as they are."""
    made: list[Files] = []
    for source in (bundle(), graph_bundle()):
        content, at, streams = pack(source)[:-32], len(MAGIC) + 1, []
        while at < len(content):
            (size,) = struct.unpack_from("<I", content, at)
            streams.append(content[at + 4 : at + 4 + size])
            at += 4 + size
        parts = {"0": zlib.decompress(streams[0])} | {f"raw{k}": stream for k, stream in enumerate(streams)}
        for number in (1, 2):
            (size,) = struct.unpack_from("<I", streams[number])
            parts[f"{number}codes"] = zlib.decompress(streams[number][4 : 4 + size], -15)
            parts[f"{number}planes"] = zlib.decompress(streams[number][4 + size :])
        if len(streams) == 4:
            parts["3"] = zlib.decompress(streams[3])
        made.append({name: part for name, part in parts.items() if "raw" not in name})
    return [*made, {name: part for name, part in parts.items() if "raw" in name}]


def write_packed(files: Files, folder: Path) -> Path:
    streams = [content for name, content in sorted(files.items()) if "raw" in name]
    if not streams:
        streams.append(zlib.compress(files["0"]))
        for number in "12":
            flat = zlib.compressobj(9, zlib.DEFLATED, -15)
            codes = flat.compress(files[f"{number}codes"]) + flat.flush()
            streams.append(struct.pack("<I", len(codes)) + codes + zlib.compress(files[f"{number}planes"]))
        streams += [zlib.compress(files["3"])] if "3" in files else []
    body = MAGIC + bytes([VERSION]) + b"".join(struct.pack("<I", len(item)) + item for item in streams)
    (folder / "x.edgepack").write_bytes(body + hashlib.sha256(body).digest())
    return folder / "x.edgepack"


def graphs() -> list[Files]:
    """A product, and a loop with a branch in it."""
    from onnx import TensorProto, helper, numpy_helper

    def value(name: str, shape: Any, dtype: int = TensorProto.FLOAT) -> Any:
        return helper.make_tensor_value_info(name, dtype, shape)

    stored = [numpy_helper.from_array(np.ones((3, 4), np.float32), "w")]
    product = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "g",
        [value("x", ["batch", 3])],
        [value("y", ["batch", 4])],
        stored,
    )
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Neg", ["a"], ["b"])],
        "body",
        [value("i", [], TensorProto.INT64), value("go", [], TensorProto.BOOL), value("a", ["batch", 3])],
        [value("still", [], TensorProto.BOOL), value("b", ["batch", 3])],
    )
    counts = [numpy_helper.from_array(np.array(3), "trips"), numpy_helper.from_array(np.array(True), "yes")]
    loop = helper.make_graph(
        [helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)],
        "g",
        [value("x", ["batch", 3])],
        [value("y", ["batch", 3])],
        counts,
    )
    opsets = [helper.make_opsetid("", 17)]
    made = [helper.make_model(graph, opset_imports=opsets, ir_version=8) for graph in (product, loop)]
    return [{"x.onnx": model.SerializeToString()} for model in made]


def changed_graph(files: Files, rng: random.Random) -> Files:
    """The file with some fields of its messages changed, so that it is still protobuf; one in four with changed
    bytes."""
    import onnx

    if rng.random() < 0.25:
        return changed(files, rng)
    model = onnx.load_from_string(files["x.onnx"])
    for _ in range(rng.randint(1, 4)):
        message = rng.choice(list(_messages(model)))
        field = rng.choice(message.DESCRIPTOR.fields)
        with contextlib.suppress(ValueError, TypeError):  # the field's type does not have the value
            _change_field(message, field.name, rng, model)
    return {"x.onnx": model.SerializeToString()}


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for _, value in message.ListFields():
        for item in value if hasattr(value, "extend") else [value]:
            if hasattr(item, "ListFields"):
                yield from _messages(item)


def _change_field(message: Any, name: str, rng: random.Random, model: Any) -> None:
    """Remove a value, copy one from elsewhere in the graph, or set a hostile one."""
    value = getattr(message, name)
    if hasattr(value, "extend"):
        if len(value) and rng.random() < 0.4:
            del value[rng.randrange(len(value))]
        elif hasattr(value, "add"):
            made = value.add()
            made.CopyFrom(_copy(rng.choice([item for item in _messages(model) if item.DESCRIPTOR is made.DESCRIPTOR])))
        elif len(value) and rng.random() < 0.7:
            value[rng.randrange(len(value))] = _hostile(value[0], rng)
        else:
            value.append(rng.choice((*NUMBERS, *FLOATS, *TEXTS, b"\xff" * 9)))
    elif hasattr(value, "ListFields"):
        donors = [item for item in _messages(model) if item.DESCRIPTOR is value.DESCRIPTOR]
        message.ClearField(name) if rng.random() < 0.4 or not donors else value.CopyFrom(_copy(rng.choice(donors)))
    else:
        setattr(message, name, _hostile(value, rng))


def _copy(message: Any) -> Any:
    """Return a copy outside the graph: protobuf's C code crashes if a message is copied into a part of itself."""
    made = type(message)()
    made.CopyFrom(message)
    return made


def _hostile(value: Any, rng: random.Random) -> Any:
    if isinstance(value, bytes):
        return changed({"": value}, rng)[""]
    return rng.choice(TEXTS if isinstance(value, str) else FLOATS if isinstance(value, float) else NUMBERS)


def programs() -> list[Files]:
    import torch

    torch.manual_seed(0)
    target = io.BytesIO()
    rows = {"input": {0: torch.export.Dim("rows")}}
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.zeros(2, 3),), dynamic_shapes=rows), target)
    return [members(target.getvalue())]


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


def pictures() -> list[Files]:
    from PIL import Image

    image = Image.fromarray(np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3))
    made = []
    for form in ("PNG", "JPEG", "BMP", "WEBP", "TIFF"):
        target = io.BytesIO()
        image.save(target, form)
        made.append({"x.png": target.getvalue()})
    return made


def with_checksums(content: bytes) -> bytes:
    """A PNG whose chunks have the right checksums; other images unchanged."""
    if not content.startswith(b"\x89PNG"):
        return content
    made, at = bytearray(content), 8
    while at + 12 <= len(made):
        (size,) = struct.unpack_from(">I", made, at)
        if at + 12 + size > len(made):
            break
        struct.pack_into(">I", made, at + 8 + size, zlib.crc32(made[at + 4 : at + 8 + size]))
        at += 12 + size
    return bytes(made)


def write_picture(files: Files, folder: Path) -> Path:
    path = folder / "pictures"
    for part in ("train", "test"):
        (path / part / "a").mkdir(parents=True, exist_ok=True)
        (path / part / "a" / "x.png").write_bytes(with_checksums(files["x.png"]))
    return path


def read_pictures(path: Path) -> None:
    from edgekit.data.sources import from_images

    settings = {"id": "image/1", "mean": [0.5] * 3, "std": [0.5] * 3}
    specs = (TensorSpec("image", ("batch", 3, 8, 8)),), (TensorSpec("y", ("batch", 2)),)
    from_images(path, Manifest("x", "onnx", {}, *specs, preprocessing=settings))


def recipes() -> list[Files]:
    short = '[[pass]]\nname = "magnitude_prune"\nsparsity = 0.5\n\n[[pass]]\nname = "quantize"\nbits = 8\nseed = 3\n'
    names = ("half", "fold", "dynamic_int8", "static_int8", "weight_only", "smooth_quant", "low_rank", "qat")
    tables = "".join(f"# the pass {name}\n[[pass]]\nname = '{name}'\n" for name in names)
    keep = "[[pass]]\nname = 'structured_prune'\nkeep = { heads = 8, ff_dim = 64 }\n"
    return [{"x.toml": text.encode()} for text in (short, keep + tables)]


def read_recipe(path: Path) -> None:
    from edgekit.compression import recipe

    recipe.read(path)


def targets() -> list[Files]:
    from edgekit.targets import profile

    folder = Path(profile.__file__).parent / "profiles"
    return [{"tesla-p40.toml": (folder / "tesla-p40.toml").read_bytes()}]


def read_target(path: Path) -> None:
    from edgekit.targets import profile

    profile.read.cache_clear()  # every file has the same path
    command("targets", "FILE")(path)


def safetensors_parts() -> list[Files]:
    """The header and the numbers apart, so that the length before the header stays right; and the file as it is."""
    content = bundle().contents["weights.safetensors"]
    (size,) = struct.unpack_from("<Q", content)
    return [{"header": content[8 : 8 + size], "numbers": content[8 + size :]}, {"file": content}]


def write_safetensors(files: Files, folder: Path) -> Path:
    whole = files.get("file")
    if whole is None:
        whole = struct.pack("<Q", len(files["header"])) + files["header"] + files["numbers"]
    (folder / "x.safetensors").write_bytes(whole)
    return folder / "x.safetensors"


IMPORT = command("import", "FILE", "-o", "OUTPUT", "--force")
READERS = {
    "npz": Reader(arrays, write_arrays, read_arrays),
    "safetensors": Reader(
        safetensors_parts, write_safetensors, lambda path: arrays_from_safetensors(read_file(path), str(path))
    ),
    "bundle": Reader(bundle_files, write_bundle, read_bundle),
    "pack": Reader(packed_parts, write_packed, read_bundle),
    "recipe": Reader(recipes, one_file("x.toml"), read_recipe),
    "target": Reader(targets, one_file("tesla-p40.toml"), read_target),
    "image": Reader(pictures, write_picture, read_pictures),
    "onnx": Reader(graphs, one_file("x.onnx"), IMPORT, change=changed_graph),
    "hugging-face": Reader(folders, write_folder, IMPORT),
    "language-folder": Reader(
        fuzz_language_folder.language_folders,
        fuzz_language_folder.write_language_folder,
        fuzz_language_folder.read_language_folder,
        memory=2 << 30,
    ),
    "pt2": Reader(programs, archive("x.pt2"), IMPORT),
    "message": Reader(
        lambda: [{"seed": b"0"}], one_file("seed"), fuzz_stream.read_messages, change=fuzz_stream.drawn_seed
    ),
    "registry": Reader(fuzz_stream.answers, one_file("answer"), fuzz_stream.read_answer, allowed=("urllib.",)),
    "broker": Reader(fuzz_stream.configurations, one_file("broker.toml"), fuzz_stream.read_configuration),
    "cutout": Reader(
        fuzz_cutouts.images, fuzz_cutouts.write_image, fuzz_cutouts.read, change=fuzz_cutouts.changed_image
    ),
    "gguf": Reader(  # a chat template runs in the sandbox, with a limit of its own
        fuzz_gguf.models, fuzz_gguf.write_model, fuzz_gguf.read_model, change=fuzz_gguf.changed_model, memory=2 << 30
    ),
}
