"""DECam's fluxes are compared with magnitudes converted by hand, and with the real packet."""

import io

import fastavro
import numpy as np
import pytest

from alert_broker.containers import split
from alert_broker.packets import batches
from alert_broker.surveys.base import PacketError, survey_named
from tests.alert_broker.small import light_curve

DECAM = survey_named("decam")
PER_MAGNITUDE = 2.5 / np.log(10)


def row(mjd=61_000.0, band="g", magnitude=22.0, error=0.1, sign=1.0):
    """Return a magnitude as DESIRT writes it: m = 31.4 - 2.5 log10 of nJy, or 23.9 - 2.5 log10 of microjansky."""
    flux = sign * 10 ** ((31.4 - magnitude) / 2.5)
    flux_error = abs(flux) * error / PER_MAGNITUDE
    return {
        "mjd": mjd,
        "band": band,
        "psfFlux": flux,
        "psfFluxErr": flux_error,
        "forcediffimflux": flux / 1000,
        "forcediffimfluxunc": flux_error / 1000,
        "forcediffimmag": magnitude,
        "isdiffpos": int(sign > 0),
    }


def packet(candidate, history=()):
    return {"objectId": "c4d_1", "candid": 5, "candidate": candidate, "fp_hists": list(history)}


def test_fluxes_are_those_of_the_magnitudes():
    candidate = row(magnitude=22.0)
    curve = light_curve(DECAM, packet(candidate, [candidate, row(60_990.0, "z", 20.0, sign=-1), row(60_990.0, "r")]))
    expected = 10 ** ((27.5 - np.array([22.0, 20.0, 22.0])) / 2.5) * [1, -1, 1]
    order = [2, 1, 0] if curve.band[0] == 1 else [1, 2, 0]
    assert curve.flux == pytest.approx(expected[order], rel=1e-12)
    assert curve.flux_error == pytest.approx(np.abs(expected[order]) * 0.1 / PER_MAGNITUDE)
    assert curve.band.tolist() == [[0, 3, 1][k] for k in order]
    assert curve.detected.tolist() == [False, False, True]  # the candidate's exposure occurs once, as the detection
    assert (curve.alert_id, curve.object_id, curve.dropped) == (5, "c4d_1", 0)
    # planted: microjansky instead of nanojansky, and a forgotten sign
    wrong = {**candidate, "psfFlux": candidate["forcediffimflux"]}
    assert light_curve(DECAM, packet(wrong)).flux != pytest.approx(expected[:1], rel=1e-3)
    assert curve.flux != pytest.approx(np.abs(expected[order]), rel=1e-3)


def test_rows_that_are_not_measurements_are_dropped_and_counted():
    bad = [row(band="VR"), row(60_990.0) | {"psfFlux": float("nan")}, row(60_991.0) | {"psfFluxErr": 0.0}, row(1.0)]
    assert light_curve(DECAM, packet(row(), bad)).dropped == 4
    with pytest.raises(PacketError, match="objectId is ''"):
        light_curve(DECAM, packet(row()) | {"objectId": ""})


@pytest.mark.realdata
def test_the_real_packet(shared_data):
    """The packet's own magnitude determines the expected flux."""
    data = (shared_data / "alerts" / "other" / "decam.avro").read_bytes()
    (batch,) = batches(split(data, "decam.avro"))
    (value,) = fastavro.reader(io.BytesIO(data))
    candidate = value["candidate"]
    assert batch.survey.name == "decam"
    assert batch.alerts["object_id"].to_pylist() == [value["objectId"]]
    assert batch.curves.flux == pytest.approx([10 ** ((27.5 - candidate["forcediffimmag"]) / 2.5)], rel=1e-6)
    assert batch.curves.flux / batch.curves.flux_error == pytest.approx(
        [PER_MAGNITUDE / candidate["forcediffimmagunc"]], rel=1e-3
    )
    assert batch.curves.time.tolist() == [candidate["mjd"]]
    assert batch.curves.detected.tolist() == [True]
