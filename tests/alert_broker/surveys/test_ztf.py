"""ZTF's magnitudes, counts and flags are compared with numbers calculated by hand."""

import fastavro
import numpy as np
import pytest

from alert_broker.surveys.base import survey_named
from tests.alert_broker.small import light_curve
from tests.alert_broker.surveys.rows import flux_of_magnitude, ztf, ztf_forced, ztf_row

ZTF = survey_named("ztf")


def test_ztf_magnitudes_become_fluxes():
    curve = light_curve(ZTF, ztf(ztf_row(magpsf=20.0, sigmapsf=0.1), [ztf_row(2_458_999.5, 2, 18.5, 0.02, "f")]))
    # magnitude 20 is 7.5 magnitudes brighter than the zero point
    assert curve.flux == pytest.approx([-flux_of_magnitude(18.5), 1000.0], rel=1e-12)
    assert curve.flux_error == pytest.approx([0.01842068 * 3981.0717, 92.1034], rel=1e-6)
    assert curve.time.tolist() == [58_999.0, 59_000.0]
    assert curve.band.tolist() == [1, 0]
    assert curve.detected.all()
    # planted: the sign forgotten; zero point 25
    for planted in (flux_of_magnitude(18.5), -(10 ** (-0.4 * (18.5 - 25.0)))):
        assert curve.flux[0] != pytest.approx(planted, rel=1e-3)


@pytest.mark.parametrize(("flag", "sign"), [("t", 1), ("1", 1), ("f", -1), ("0", -1)])
def test_ztf_sign_flags(flag, sign):
    assert np.sign(light_curve(ZTF, ztf(ztf_row(isdiffpos=flag))).flux).tolist() == [sign]


def test_ztf_forced_photometry_fills_exposures_without_a_detection():
    forced = [ztf_forced(2_459_000.5, flux=5.0), ztf_forced(2_458_995.5, flux=-40.0, error=8.0, zero_point=26.3)]
    curve = light_curve(ZTF, ztf(fp_hists=forced))
    counts = 10 ** (0.4 * (27.5 - 26.3))  # FLUXCAL of one count
    assert curve.flux == pytest.approx([-40 * counts, 1000.0])
    assert curve.flux_error[0] == pytest.approx(8 * counts)
    assert curve.detected.tolist() == [False, True]
    assert light_curve(ZTF, ztf()).flux.tolist() == pytest.approx([1000.0])  # schemas before 4.01 have no fp_hists


def test_ztf_forced_photometry_on_bad_pixels_is_dropped():
    bad = [ztf_forced(flux=-99999.0, error=-99999.0, status="61"), ztf_forced(flux=3.0, status="56")]
    bad += [ztf_forced(flux=None), ztf_forced(zero_point=None), ztf_forced(error=0.0)]
    curve = light_curve(ZTF, ztf(fp_hists=bad))
    assert len(curve.time) == 1
    assert curve.dropped == 5


def test_ztf_upper_limits_are_counted_not_points():
    limit = dict.fromkeys(ztf_row(), None) | {"jd": 2_458_990.5, "fid": 1}
    curve = light_curve(ZTF, ztf(history=[limit, limit]))
    assert (len(curve.time), curve.upper_limits, curve.dropped) == (1, 2, 0)
    assert light_curve(ZTF, ztf() | {"prv_candidates": None}).upper_limits == 0


@pytest.mark.realdata
def test_real_ztf_forced_photometry_agrees_with_the_detections(shared_data):
    """Detections are magnitudes, and forced photometry is counts with a zero point, so a wrong unit or sign would
    show."""
    ratios = []
    for path in (shared_data / "alerts" / "ztf_kowalski").glob("*.avro"):
        with path.open("rb") as stream:
            (packet,) = fastavro.reader(stream)
        rows = [packet["candidate"], *packet["prv_candidates"]]
        for forced in packet["fp_hists"] or []:
            twins = [row for row in rows if (row["jd"], row["fid"]) == (forced["jd"], forced["fid"]) and row["magpsf"]]
            if twins and forced["procstatus"] == "0" and twins[0]["pid"] == forced["pid"]:
                measured = light_curve(ZTF, ztf(ztf_row(3e6)) | {"candidate": twins[0]}).flux[0]
                alone = light_curve(ZTF, ztf(ztf_row(fid=9), fp_hists=[forced])).flux[0]
                ratios.append(alone / measured)
    assert len(ratios) >= 20
    assert np.median(ratios) == pytest.approx(1.0, abs=0.03)
