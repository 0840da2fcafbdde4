"""Images in FITS files are read as astropy reads them, and every other file is refused with one of the reasons."""

import io

import numpy as np
import pytest

from alert_broker.cutouts.fits import CUT_SHORT, NO_FITS, NO_IMAGE, TOO_LARGE, ImageError, read_image
from tests.alert_broker.small import fits

RNG = np.random.default_rng(0)
STORED = {
    "uint8": RNG.integers(0, 256, (5, 7)).astype(np.uint8),
    "int16": RNG.integers(-(2**15), 2**15, (5, 7)).astype(np.int16),
    "int32": RNG.integers(-(2**31), 2**31, (5, 7)).astype(np.int32),
    "int64": RNG.integers(-(2**60), 2**60, (5, 7)).astype(np.int64),
    "float32": RNG.normal(0, 1e3, (5, 7)).astype(np.float32),
    "float64": RNG.normal(0, 1e3, (5, 7)),
}


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("scale", [{}, {"BSCALE": 0.25, "BZERO": "1.5D1"}])
def test_values_are_zero_plus_scale_times_stored(dtype, scale):
    stored = STORED[dtype]
    expected = stored.astype(np.float64) * (0.25 if scale else 1) + (15 if scale else 0)
    image = read_image(fits(stored, scale))
    assert image.shape == (5, 7)
    assert image.tolist() == expected.tolist()
    # the twin: another zero point
    assert read_image(fits(stored, {"BZERO": 1000})).tolist() != expected.tolist()


def test_a_blank_integer_is_nan():
    stored = np.array([[3, -9], [-9, 4]], np.int16)
    image = read_image(fits(stored, {"BLANK": -9, "BSCALE": 2}))
    assert np.isnan(image).tolist() == [[False, True], [True, False]]
    assert (image[0, 0], image[1, 1]) == (6, 8)


@pytest.mark.parametrize("dtype", STORED)
def test_astropy_reads_the_same(dtype):
    astropy_fits = pytest.importorskip("astropy.io.fits")
    stored = STORED[dtype]
    for extension in (False, True):
        image = (astropy_fits.ImageHDU if extension else astropy_fits.PrimaryHDU)(stored)
        image.header["BUNIT"], image.header["COMMENT"] = "DN", "END is a word in this comment"
        hdus = astropy_fits.HDUList([astropy_fits.PrimaryHDU(), image] if extension else [image])
        hdus.append(astropy_fits.ImageHDU(np.zeros((3, 3)), name="MASK"))
        file = io.BytesIO()
        hdus.writeto(file)
        assert read_image(file.getvalue()).tolist() == stored.astype(np.float64).tolist()


@pytest.mark.realdata
def test_astropy_reads_the_same_from_real_packets(shared_data):
    import gzip

    from alert_broker.stream.cutouts import cutouts

    astropy_fits = pytest.importorskip("astropy.io.fits")
    alerts = shared_data / "alerts"
    paths = [*alerts.glob("ztf*/*.avro"), *alerts.glob("other/decam.avro"), *alerts.glob("lsst_wire/*.bin")]
    columns = cutouts([path.read_bytes() for path in paths])
    images = [value for column in columns for value in column.to_pylist() if value is not None]
    assert len(images) >= 3 * 100
    for data in images:
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        with astropy_fits.open(io.BytesIO(plain)) as hdus:
            np.testing.assert_array_equal(read_image(plain), hdus[0].data)


IMAGE = np.zeros((4, 6), np.float32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", NO_FITS),
        (b"hello" * 1000, NO_FITS),
        (b"SIMPLE  =                    T", CUT_SHORT),
        (fits(IMAGE)[:2880], CUT_SHORT),
        (fits(IMAGE)[: 2880 + 95], CUT_SHORT),
        (fits(IMAGE, {"SIMPLE": "F"}), NO_FITS),
        (fits(IMAGE, {"NAXIS": 3, "NAXIS3": 2}), NO_IMAGE),
        (fits(IMAGE, {"NAXIS": 0}), NO_IMAGE),
        (fits(IMAGE, {"NAXIS": "two"}), NO_IMAGE),
        (fits(IMAGE, {"BITPIX": 12}), NO_IMAGE),
        (fits(IMAGE, {"NAXIS1": -6}), NO_IMAGE),
        (fits(IMAGE, {"NAXIS1": 0}), NO_IMAGE),
        (fits(IMAGE, {"NAXIS1": 10**15}), TOO_LARGE),
        (fits(IMAGE, {"NAXIS1": "9" * 60}), NO_IMAGE),
        (fits(IMAGE, {"BSCALE": "1e999"}), NO_IMAGE),
        (fits(IMAGE, {"BZERO": "nan"}), NO_IMAGE),
        (fits(IMAGE, {"PCOUNT": 4}), NO_IMAGE),
        (fits(IMAGE)[:80] + b" " * 80 * 10_000, CUT_SHORT),
    ],
)
def test_bad_files_have_a_reason(data, reason):
    with pytest.raises(ImageError, match=f"^{reason}$"):
        read_image(data)


@pytest.mark.parametrize("seed", range(300))
def test_damage_gives_an_image_or_a_reason(seed):
    """Never another exception, and never an image of another size than the header says."""
    rng = np.random.default_rng(seed)
    data = bytearray(fits(rng.normal(size=(4, 6)).astype(np.float32), {"BSCALE": 2, "BZERO": 1}))
    for _ in range(rng.integers(1, 6)):
        data[rng.integers(0, 8 * 80)] = rng.choice(list(b"0123456789 -=/ENDT'.\x00\xff"))
    data = data[: rng.integers(0, len(data) + 1)] if seed % 3 == 0 else data
    try:
        image = read_image(bytes(data))
    except ImageError as refused:
        image, reason = None, str(refused)
    else:
        reason = ""
    assert reason in ("", NO_FITS, CUT_SHORT, NO_IMAGE, TOO_LARGE)
    if image is not None:
        assert image.ndim == 2
        assert 0 < max(image.shape) <= 1024


def test_a_remembered_header_decides_only_for_files_that_begin_with_it():
    first, other = fits(np.ones((4, 6), np.float32)), fits(np.ones((4, 5), np.float32))
    for _ in range(2):  # the second time, both headers are known
        assert read_image(first).shape == (4, 6)
        assert read_image(other).shape == (4, 5)
    cut = first[:2000]  # ends inside its header's block, after END
    assert cut.count(b"END")
    with pytest.raises(ImageError, match=CUT_SHORT):
        read_image(cut)
    assert read_image(first).tolist() == np.ones((4, 6)).tolist()  # what was cut short is not remembered
    for side in range(1, 20):  # more headers than are remembered
        assert read_image(fits(np.full((side, 3), side, np.float32))).tolist() == [[side] * 3] * side
