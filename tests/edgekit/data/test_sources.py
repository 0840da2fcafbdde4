"""Rows from tables, folders of images and the user's own iterables: the same arrays as from an .npz."""

import contextlib
import struct
import subprocess
import sys
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from edgekit.bundle.tensors import TensorSpec
from edgekit.data import sources
from edgekit.data.dataset import UNKNOWN, is_labelled, load
from edgekit.errors import EdgekitError


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, (6, 12, 2)).astype(np.float32), np.arange(6) % 3, np.array([0, 0, 0, 1, 1, 1])


def test_a_parquet_table(rows, tiny_bundle, tmp_path):
    curves, labels, split = rows
    table = pa.table({"light_curve": curves.reshape(6, -1).tolist(), "labels": labels, "split": split, "other": labels})
    pq.write_table(table, tmp_path / "t.parquet")
    train, test = load(tmp_path / "t.parquet", tiny_bundle.manifest)
    assert np.array_equal(train.inputs["light_curve"], curves[:3])
    assert np.array_equal(test.inputs["light_curve"], curves[3:])
    assert test.labels.tolist() == [0, 1, 2]


def test_a_parquet_table_of_another_shape(rows, tiny_bundle, tmp_path):
    curves, labels, split = rows
    pq.write_table(
        pa.table({"light_curve": curves[:, :5].reshape(6, -1).tolist(), "labels": labels, "split": split}),
        tmp_path / "t.parquet",
    )
    with pytest.raises(EdgekitError, match=r"'light_curve' has 60 numbers in 6 rows; expected \(batch, 12, 2\)"):
        load(tmp_path / "t.parquet", tiny_bundle.manifest)


@pytest.mark.parametrize(
    ("column", "spoilt", "words"),
    [
        # as many numbers in all as there should be: read one after the other they would shift every row after the first
        ("light_curve", lambda rows: [rows[0][:-1], [*rows[1], 0.0], *rows[2:]], "'light_curve' differ in length"),
        ("light_curve", lambda rows: [None, rows[1] + rows[1], *rows[2:]], "'light_curve' differ in length, or some"),
        ("light_curve", lambda rows: [["a"] * 24 for _ in rows], "'light_curve' holds string"),
        ("light_curve", lambda rows: [[None, *rows[0][1:]], *rows[1:]], "1 missing"),
        ("labels", lambda labels: [None, *labels[1:]], "'labels' holds int64 with 1 missing"),
    ],
)
def test_a_parquet_table_whose_rows_are_not_alike(column, spoilt, words, rows, tiny_bundle, tmp_path):
    curves, labels, split = rows
    table = {"light_curve": curves.reshape(6, -1).tolist(), "labels": labels.tolist(), "split": split.tolist()}
    pq.write_table(pa.table(table | {column: spoilt(table[column])}), tmp_path / "t.parquet")
    with pytest.raises(EdgekitError, match=words):
        load(tmp_path / "t.parquet", tiny_bundle.manifest)


@pytest.mark.parametrize("kind", [pa.large_list(pa.float64()), pa.list_(pa.list_(pa.float32(), 2), 12)], ids=str)
def test_lists_of_every_kind(kind, rows, tiny_bundle, tmp_path):
    curves, labels, split = rows
    values = curves.tolist() if "list" in str(kind.value_type) else curves.reshape(6, -1).tolist()
    table = pa.table({"light_curve": pa.array(values, kind), "labels": labels, "split": split})
    pq.write_table(table, tmp_path / "t.parquet")
    assert np.array_equal(load(tmp_path / "t.parquet", tiny_bundle.manifest)[0].inputs["light_curve"], curves[:3])


def test_a_damaged_parquet_table(tiny_bundle, tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1....")
    with pytest.raises(EdgekitError, match="cannot be read as Parquet"):
        load(tmp_path / "t.parquet", tiny_bundle.manifest)


@pytest.fixture
def pictures(tmp_path, tiny_bundle):
    """Write red and blue pictures into a folder; return it and the manifest of a model that takes them."""
    for part, count in (("train", 3), ("test", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (20 + number, 16), colour).save(tmp_path / "pictures" / part / name / f"{number}.png")
    manifest = replace(
        tiny_bundle.manifest,
        inputs=(TensorSpec("image", ("batch", 3, 8, 8)),),
        classes=("red", "blue"),
        preprocessing={"id": "image/1", "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.5, 0.5]},
    )
    return tmp_path / "pictures", manifest


def test_a_folder_of_images(pictures):
    folder, manifest = pictures
    train, test = load(folder, manifest)
    assert train.inputs["image"].shape == (6, 3, 8, 8)
    assert len(test) == 4
    red = train.inputs["image"][train.labels == 0]
    assert np.allclose(red[:, 0], 2.0)
    assert np.allclose(red[:, 1], -1.0)
    assert np.allclose(train.inputs["image"][train.labels == 1][:, 0], -2.0)


def test_images_are_not_guessed_at(pictures):
    folder, manifest = pictures
    with pytest.raises(EdgekitError, match="a guess would cost accuracy"):
        load(folder, replace(manifest, preprocessing=None))
    with pytest.raises(EdgekitError, match="class 'blue' is not one of the model's"):
        load(folder, replace(manifest, classes=("red",)))
    (folder / "test" / "red" / "0.png").write_bytes(b"no image")
    with pytest.raises(EdgekitError, match=r"0\.png: not a readable image"):
        load(folder, manifest)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    for k in range(4):\n"
        "        yield {'light_curve': np.full((12, 2), k, np.float32), 'labels': k % 3, 'split': k % 2}\n"
        "uneven = [{'a': 1}, {'b': 2}]\n"
        "def breaks():\n"
        "    yield {'labels': 1}\n"
        "    raise OSError('the disk went away')\n"
        "number = 5\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield "my_rows"
    sys.modules.pop("my_rows", None)


def test_an_iterable_of_the_users(module, tiny_bundle):
    train, test = load(f"{module}:rows", tiny_bundle.manifest)
    assert train.inputs["light_curve"][:, 0, 0].tolist() == [0, 2]
    assert test.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uneven", "row 1"),
        ("number", "gives a int"),
        ("nothing", "nothing"),
        ("breaks", "OSError: the disk went away"),
    ],
)
def test_what_is_no_iterable_of_rows(name, words, module, tiny_bundle):
    with pytest.raises(EdgekitError, match=words):
        load(f"{module}:{name}", tiny_bundle.manifest)


def test_labels_may_be_missing_where_nobody_needs_them(rows, tiny_bundle, tmp_path):
    curves, _, split = rows
    np.savez(tmp_path / "x.npz", light_curve=curves, split=split)
    with pytest.raises(EdgekitError, match="no array 'labels'"):
        load(tmp_path / "x.npz", tiny_bundle.manifest)
    train, _ = load(tmp_path / "x.npz", tiny_bundle.manifest, labelled=False)
    assert set(train.labels.tolist()) == {UNKNOWN}
    assert not is_labelled(train)


def test_numbers_to_learn_must_be_numbers(rows, tiny_bundle, tmp_path):
    curves, labels, split = rows
    regression = replace(tiny_bundle.manifest, classes=())
    np.savez(tmp_path / "x.npz", light_curve=curves, labels=np.where(labels == 1, np.nan, 0.5), split=split)
    with pytest.raises(EdgekitError, match="labels hold NaN or infinite values"):
        load(tmp_path / "x.npz", regression)
    np.savez(tmp_path / "x.npz", light_curve=curves, labels=labels / 2, split=split)
    assert load(tmp_path / "x.npz", regression)[0].labels.tolist() == [0, 0.5, 1]


def png_of(width, height, *chunks):
    """A PNG that declares this size and holds no pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*item) for item in chunks) + chunk(b"IEND", b"")


TEXT_BOMB = zlib.compress(bytes(100_000_000), 9)
BAD_PICTURES = {
    "a program for a printer": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(evil) run\nshowpage\n",
    "two billion pixels": png_of(60_000, 40_000, (b"IDAT", zlib.compress(b""))),
    "a hundred and fifty million pixels": png_of(15_000, 10_000, (b"IDAT", zlib.compress(b""))),
    "a text that expands": png_of(9, 9, (b"zTXt", b"a\0\0" + TEXT_BOMB), (b"IDAT", zlib.compress(b""))),
    "no pixels": png_of(9, 9, (b"IDAT", b"")),
    "no width": png_of(0, 9, (b"IDAT", b"")),
    "nothing": b"",
    "text": b"hello",
}


@pytest.mark.parametrize("content", BAD_PICTURES.values(), ids=BAD_PICTURES)
@pytest.mark.filterwarnings("error")
def test_a_hostile_picture_is_one_line_and_starts_nothing(content, pictures, monkeypatch):
    folder, manifest = pictures
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: pytest.fail("a program was started"))
    (folder / "test" / "red" / "x.png").write_bytes(content)
    with pytest.raises(EdgekitError, match=r"x\.png: not a readable image") as caught:
        load(folder, manifest)
    assert "\n" not in str(caught.value)


def test_a_small_file_with_many_pixels_needs_a_limit_that_the_user_raises(pictures, monkeypatch):
    """Its pixels take more than 256 MiB while they are decoded and converted."""
    folder, manifest = pictures
    path = folder / "test" / "red" / "x.png"
    path.write_bytes(png_of(7_000, 5_000, (b"IDAT", zlib.compress(bytes(5_000 * 21_001)))))
    with pytest.raises(EdgekitError, match=r"x\.png: .* bytes declare 280,000,000 bytes in memory.*--read-limit"):
        load(folder, manifest)
    monkeypatch.setenv("EDGEKIT_READ_LIMIT", "1GB")
    load(folder, manifest)


def test_without_the_list_of_decoders_ghostscript_would_be_asked(tmp_path, monkeypatch):
    """The twin: Pillow looks at the content, not at the name."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments: pytest.fail("Ghostscript"))
    (tmp_path / "x.png").write_bytes(BAD_PICTURES["a program for a printer"])
    with pytest.raises(pytest.fail.Exception, match="Ghostscript"), Image.open(tmp_path / "x.png") as image:
        image.load()


SAMPLES = struct.pack("<4sIH", b"II*\0", 8, 6) + b"".join(  # a TIFF of 99 samples to a pixel
    struct.pack("<HHII", tag, 3, 1, value)
    for tag, value in ((256, 9), (257, 9), (258, 8), (259, 1), (262, 2), (277, 99))
)


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "planted"])
def test_pillow_prints_nothing_of_its_own_about_an_image(planted, pictures, monkeypatch, caplog, recwarn):
    folder, manifest = pictures
    monkeypatch.setenv("EDGEKIT_READ_LIMIT", "1GB")
    if planted:
        monkeypatch.setattr(sources, "_quiet", contextlib.nullcontext)
    for content in (SAMPLES, png_of(9600, 9600, (b"IDAT", b""))):
        (folder / "test" / "red" / "x.png").write_bytes(content)
        with pytest.raises(EdgekitError, match=r"x\.png: not a readable image"):
            load(folder, manifest)
    assert ("More samples per pixel" in caplog.text) == planted
    assert any("decompression bomb" in str(item.message) for item in recwarn) == planted
