"""Both decompressors give the same bytes, and refuse the same damaged data."""

import gzip
import zlib

import numpy as np
import pytest

from alert_broker.cutouts.fits import ImageError
from alert_broker.cutouts.inflate import BOMB, DAMAGED, Gunzip, inflaters

CONTENT = np.random.default_rng(0).normal(size=4000).astype(">f4").tobytes()
PACKED = gzip.compress(CONTENT, mtime=0)
PACKAGES = [
    "zlib",
    pytest.param("isal", marks=pytest.mark.skipif("isal" not in inflaters(), reason="isal is an extra")),
]


@pytest.mark.parametrize("package", PACKAGES)
def test_content(package):
    assert Gunzip(len(CONTENT), package)(PACKED) == CONTENT
    assert Gunzip(len(CONTENT), package)(memoryview(b".." + PACKED)[2:]) == CONTENT
    assert Gunzip(10, package)(CONTENT[:9]) == CONTENT[:9]  # not gzip


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PACKED[:-1], DAMAGED),
        (PACKED[:-9], DAMAGED),
        (PACKED[:5000], DAMAGED),
        (PACKED[:11], DAMAGED),
        (PACKED[:2], DAMAGED),
        (PACKED[:-8] + bytes(4) + PACKED[-4:], DAMAGED),  # another checksum
        (PACKED[:-4] + bytes(4), DAMAGED),  # another length
        (PACKED[:5000] + bytes([PACKED[5000] ^ 0x55]) + PACKED[5001:], DAMAGED),
        (PACKED + b"more", DAMAGED),
        (PACKED + PACKED, DAMAGED),
        (gzip.compress(bytes(1 << 24)), BOMB),
        (gzip.compress(CONTENT + b"."), BOMB),
    ],
)
def test_damaged_data_has_a_reason(package, data, reason):
    with pytest.raises(ImageError, match=f"^{reason}$"):
        Gunzip(len(CONTENT), package)(data)


def test_a_bomb_takes_little_memory(monkeypatch):
    """A billion zeros stop at the limit."""
    import tracemalloc

    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()
    gunzip = Gunzip(100_000)
    tracemalloc.start()
    with pytest.raises(ImageError, match=BOMB):
        gunzip(bomb)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("seed", range(200))
def test_damage_anywhere_gives_the_content_or_a_reason(seed):
    rng = np.random.default_rng(seed)
    data = bytearray(PACKED)
    for _ in range(rng.integers(1, 4)):
        data[rng.integers(2, len(data))] = rng.integers(0, 256)
    data = bytes(data[: rng.integers(0, len(data))] if seed % 2 else data)
    found = set()
    for package in inflaters():
        try:
            found.add(bytes(Gunzip(len(CONTENT), package)(data)))
        except ImageError as error:
            found.add("damaged" if str(error) in (DAMAGED, BOMB) else str(error))
    assert len(found) == 1
    assert found <= {"damaged", CONTENT, data}
