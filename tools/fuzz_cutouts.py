"""The reader of an alert's images, for `fuzz_readers.py`: gzip around FITS. The harness changes the FITS file and
compresses it again, or changes the compressed bytes."""

from __future__ import annotations

import gzip
import random
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fuzz_changes import Files

BLOCK, CARD = 2880, 80
FITS, PACKED = "x.fits", "x.fits.gz"


def _fits(image: np.ndarray, **cards: object) -> bytes:
    stored = image.astype(image.dtype.newbyteorder(">")).tobytes()
    bitpix = (8 if image.dtype.kind in "iu" else -8) * image.dtype.itemsize
    values = {"SIMPLE": "T", "BITPIX": bitpix, "NAXIS": 2, "NAXIS1": image.shape[1], "NAXIS2": image.shape[0], **cards}
    text = "".join(f"{name:<8}= {value!s:>20}".ljust(CARD) for name, value in values.items()) + "END".ljust(CARD)
    return text.ljust(BLOCK).encode() + stored + b"\0" * (-len(stored) % BLOCK)


def images() -> list[Files]:
    rng = np.random.default_rng(0)
    floats = _fits(rng.normal(0, 100, (63, 63)).astype(np.float32))
    whole = _fits(rng.integers(-99, 99, (5, 7)).astype(np.int16), BSCALE=0.5, BZERO=3, BLANK=-7)
    return [{FITS: floats}, {FITS: whole}, {PACKED: gzip.compress(floats, mtime=0)}]


def write_image(files: Files, folder: Path) -> Path:
    path = folder / PACKED
    path.write_bytes(gzip.compress(files[FITS], mtime=0) if FITS in files else files[PACKED])
    return path


def changed_image(files: Files, rng: random.Random) -> Files:
    """One in two has a changed value in its header; the others have changed bytes."""
    from fuzz_changes import NUMBERS, TEXTS, changed

    if FITS not in files or rng.random() < 0.5:
        return changed(files, rng)
    content = bytearray(files[FITS])
    for _ in range(rng.randint(1, 3)):
        at = CARD * rng.randrange(9)
        value = str(rng.choice((*NUMBERS, *TEXTS, "1D400", "'IMAGE   '", "-32", "T"))).encode(errors="replace")
        content[at + 10 : at + CARD] = value[:70].rjust(20).ljust(70)[:70]
    return {FITS: bytes(content)}


def read(path: Path) -> None:
    """Read the image as `alerts classify --cutouts` does."""
    from alert_broker.cutouts.fits import ImageError, read_image
    from alert_broker.cutouts.inflate import Gunzip
    from edgekit.errors import EdgekitError

    try:
        image = read_image(Gunzip(4 << 20, "zlib")(path.read_bytes()))
    except ImageError as error:
        raise EdgekitError(str(error)) from None
    assert image.ndim == 2
    assert 0 < max(image.shape) <= 1024
