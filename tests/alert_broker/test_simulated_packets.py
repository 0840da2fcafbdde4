"""Packets of given exposures are compared with numbers calculated by hand; the test has its own FITS reader."""

import datetime
import gzip
import io
import math
import re
from dataclasses import fields

import fastavro
import numpy as np
import pytest

from alert_broker.containers import WIRE_HEADER, split
from alert_broker.packets import batches
from alert_broker.simulated_packets import (
    ZTF_HISTORY_DAYS,
    Observations,
    fits,
    lsst_packet,
    message,
    write_file,
    ztf_packet,
)
from alert_broker.surveys import lsst

BLOCK = 2880


def exposures(time=(60_000.0, 60_010.0, 60_020.25, 60_021.5), flux=(-100.0, 3.0, 250.0, 100.0), detected=None):
    flux = np.array(flux, float)
    found = np.abs(flux) > 50 if detected is None else np.array(detected)
    count = len(flux)
    limit = np.linspace(20.0, 21.0, count)
    return Observations(np.array(time, float), np.arange(count) % 2, flux, np.full(count, 10.0), limit, found)


def ztf(seen=None, index=0, seed=0, cutouts=False):
    return ztf_packet(np.random.default_rng(3), seen or exposures(), index, seed, cutouts)


def rubin(seen=None, index=0, seed=0, cutouts=False):
    return lsst_packet(np.random.default_rng(3), seen or exposures(), index, seed, cutouts)


def test_taken_exposures_are_those_of_every_array():
    seen = exposures()
    for part, rows in ((seen.until(1), slice(0, 2)), (seen.take(seen.detected), seen.detected)):
        for item in fields(seen):
            assert np.array_equal(getattr(part, item.name), getattr(seen, item.name)[rows]), item.name
    curve = seen.curve(7, "name", 2, 1)
    assert (curve.alert_id, curve.object_id, curve.upper_limits, curve.dropped) == (7, "name", 2, 1)
    assert (curve.flux is seen.flux, curve.band.dtype) == (True, np.int8)


# --- ZTF


def test_ztf_has_magnitudes_where_something_was_found_and_limits_elsewhere():
    packet, _ = ztf()
    first, second, third = packet["prv_candidates"]
    assert first["magpsf"] == pytest.approx(27.5 - 2.5 * math.log10(100))  # FLUXCAL 100 is magnitude 22.5
    assert (first["isdiffpos"], third["isdiffpos"], packet["candidate"]["isdiffpos"]) == ("f", "t", "t")
    assert first["sigmapsf"] == pytest.approx(10 / 100 / (0.4 * math.log(10)))
    assert (second["magpsf"], second["isdiffpos"], second["candid"]) == (None, None, None)
    assert second["diffmaglim"] == pytest.approx(20 + 1 / 3)
    assert [row["jd"] for row in packet["prv_candidates"]] == [2_460_000.5, 2_460_010.5, 2_460_020.75]
    assert [row["fid"] for row in (first, second, third, packet["candidate"])] == [1, 2, 1, 2]
    assert (packet["candidate"]["ndethist"], packet["candidate"]["ncovhist"]) == (3, 4)
    assert packet["candid"] == packet["candidate"]["candid"]


def test_ztf_forced_counts_are_the_flux_at_the_images_zero_point():
    packet, _ = ztf()
    first = packet["fp_hists"][0]
    assert len(packet["fp_hists"]) == 3  # the newest exposure has no forced photometry yet
    assert first["forcediffimflux"] == pytest.approx(-100 * 10 ** (-0.4 * (27.5 - first["magzpsci"])))
    assert first["forcediffimflux"] / first["forcediffimfluxunc"] == pytest.approx(-10)


@pytest.mark.parametrize(("before", "kept"), [(ZTF_HISTORY_DAYS, 1), (ZTF_HISTORY_DAYS - 1 / 128, 2)])
def test_ztf_history_is_shorter_than_its_window(before, kept):
    packet, curve = ztf(exposures((60_000.0, 60_000.0 + before), (100.0, 100.0)))
    assert len(curve.time) == kept == len(packet["prv_candidates"]) + 1


def test_ztf_bad_pixels_are_flagged_dropped_and_never_a_detection():
    count = 400
    seen = exposures(60_000 + np.arange(count) / 16, np.where(np.arange(count) % 2, 100.0, 3.0))
    packet, curve = ztf(seen)
    bad = [row for row in packet["fp_hists"] if row["procstatus"] != "0"]
    assert {(row["procstatus"], row["forcediffimflux"]) for row in bad} == {("61", -99999.0)}
    assert 5 < len(bad) < 45  # a tenth of 200
    assert curve.dropped == len(bad)
    assert curve.upper_limits == 200
    assert curve.detected.sum() == 200
    assert {row["jd"] for row in bad} <= {row["jd"] for row in packet["prv_candidates"] if row["magpsf"] is None}


def test_ztf_names_are_numbers_of_26_digits_in_letters():
    for seed, index in ((0, 0), (0, 25), (0, 26), (1, 0), (10**6, 3)):
        packet, curve = ztf(index=index, seed=seed)
        assert re.fullmatch("ZTF24[a-z]{7}", packet["objectId"])
        value = 0
        for letter in packet["objectId"][5:]:
            value = 26 * value + ord(letter) - ord("a")
        assert value == (seed * 1_000_003 + index) % 26**7
        assert packet["objectId"] == curve.object_id


# --- LSST


def test_lsst_history_has_detections_and_forced_photometry_from_30_days_before_the_first():
    seen = exposures((59_900.0, 59_999.0, 60_020.0, 60_021.0, 60_022.0), (3.0, 4.0, 100.0, 5.0, 100.0))
    packet, curve = rubin(seen)
    assert [row["midpointMjdTai"] for row in packet["prvDiaForcedSources"]] == [59_999.0, 60_020.0, 60_021.0]
    assert [row["midpointMjdTai"] for row in packet["prvDiaSources"]] == [60_020.0]
    assert packet["diaSource"]["midpointMjdTai"] == 60_022.0
    assert packet["diaObject"]["nDiaSources"] == 2
    assert curve.time.tolist() == [59_999.0, 60_020.0, 60_021.0, 60_022.0]
    assert packet["prvDiaForcedSources"][0]["psfFlux"] == pytest.approx(4.0 * 10 ** (0.4 * (31.4 - 27.5)))


def test_lsst_visits_are_the_day_and_the_2_second_steps_in_it():
    packet, curve = rubin()
    days = [datetime.date(2023, 2, 25) + datetime.timedelta(days) for days in (0, 10, 20, 21)]  # MJD 60000
    steps = [0, 0, 10_800, 21_600]
    expected = [int(f"{day:%Y%m%d}{step:05}") for day, step in zip(days, steps, strict=True)]
    visits = [row["visit"] for row in (*packet["prvDiaForcedSources"], packet["diaSource"])]
    assert visits == expected
    assert curve.alert_id == packet["diaSource"]["diaSourceId"] == expected[-1] * 10**5
    assert curve.object_id == str(expected[0] * 10**5), "the object is named after its first source"
    assert {row["diaObjectId"] for row in packet["prvDiaSources"]} == {expected[0] * 10**5}


# --- images


def read_fits(data):
    """Return (name, array) of each image by the FITS standard: cards of 80 bytes, then the data, both in blocks of 2880
    bytes."""
    images = []
    while data:
        cards = {}
        at = 0
        while "END" not in cards:
            card = data[at : at + 80].decode("ascii")
            cards[card[:8].strip()] = card[10:].split("/")[0].strip().strip("'").strip()
            at += 80
        at = -(-at // BLOCK) * BLOCK
        shape = int(cards["NAXIS2"]), int(cards["NAXIS1"])
        dtype = {"-32": ">f4", "-64": ">f8"}[cards["BITPIX"]]
        size = math.prod(shape) * np.dtype(dtype).itemsize
        images.append((cards.get("EXTNAME", ""), np.frombuffer(data[at : at + size], dtype).reshape(shape)))
        assert ("SIMPLE" in cards) == (len(images) == 1)
        assert not data[at + size : at - (-size // BLOCK) * BLOCK].strip(b"\0")
        data = data[at - (-size // BLOCK) * BLOCK :]
    return images


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (24, 30), (63, 63)])
def test_fits_images_come_back(shape):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=shape).astype(">f4"), rng.normal(size=shape[::-1]).astype(">f8")
    data = fits([("", first), ("PSF", second)])
    assert len(data) % BLOCK == 0
    (name, image), (other_name, other) = read_fits(data)
    assert (name, other_name) == ("", "PSF")
    assert np.array_equal(image, first)
    assert np.array_equal(other, second)
    assert not np.array_equal(read_fits(data.replace(first.tobytes(), bytes(first.nbytes)))[0][1], first)


@pytest.mark.parametrize("significance", [-30.0, 0.1, 40.0])
def test_the_source_in_the_difference_image_has_the_significance_of_its_flux(significance):
    """A matched filter recovers the significance to a few units of noise, and the difference is science minus
    template."""
    seen = exposures((60_000.0, 60_001.0), (100.0, 10 * significance), [True, True])
    packet, _ = ztf(seen, cutouts=True)
    names = ("cutoutScience", "cutoutTemplate", "cutoutDifference")
    science, template, difference = (read_fits(gzip.decompress(packet[name]["stampData"]))[0][1] for name in names)
    np.testing.assert_allclose(difference, science - template, atol=1e-4)
    axis = np.arange(63) - 31
    psf = np.exp(-0.5 * (axis[:, None] ** 2 + axis**2))
    found = (difference * psf).sum() / np.sqrt((psf**2).sum())
    assert abs(found - significance) < 4


def test_rubins_cutouts_carry_uncertainty_and_a_normalised_point_spread_function():
    packet, _ = rubin(cutouts=True)
    (_, image), (uncertainty_name, uncertainty), (psf_name, psf) = read_fits(packet["cutoutDifference"])
    assert (image.shape, uncertainty.shape, psf.shape) == ((30, 30), (30, 30), (41, 41))
    assert (uncertainty_name, psf_name) == ("UNCERT", "PSFIMAGE")
    assert psf.sum() == pytest.approx(1.0)
    assert psf.argmax() == psf.size // 2


# --- as they are sent


def test_a_ztf_message_is_a_container_of_its_one_packet():
    packet, _ = ztf(cutouts=True)
    data = message("ztf", packet)
    (found,) = fastavro.reader(io.BytesIO(data))
    assert found["objectId"] == packet["objectId"]
    assert found["cutoutScience"] == packet["cutoutScience"]
    assert data == message("ztf", packet)
    assert data != message("ztf", packet | {"candid": 1})  # the sync marker depends on the name, too


def test_an_lsst_message_has_the_id_of_the_newest_schema():
    packet, _ = rubin()
    data = message("lsst", packet)
    assert WIRE_HEADER.unpack(data[:5]) == (0, max(lsst.schema_versions()))
    found = fastavro.schemaless_reader(io.BytesIO(data[5:]), lsst.schema(max(lsst.schema_versions())), None)
    assert found["diaSource"]["diaSourceId"] == packet["diaSource"]["diaSourceId"]


@pytest.mark.parametrize(("survey", "make"), [("ztf", ztf), ("lsst", rubin)])
def test_a_file_of_one_is_its_message_and_a_file_of_more_a_block_for_each(survey, make, tmp_path):
    packets = [make(index=index)[0] for index in range(3)]
    single = write_file(tmp_path, survey, 0, packets[:1], single=True)
    assert single.read_bytes() == message(survey, packets[0])
    together = write_file(tmp_path, survey, 12, packets, single=False)
    assert together.name == f"{survey}_00012.avro"
    blocks = list(split(together.read_bytes(), "file"))
    assert [block.count for block in blocks] == [1, 1, 1]
    (batch,) = batches(blocks)
    assert len(batch.curves) == 3
