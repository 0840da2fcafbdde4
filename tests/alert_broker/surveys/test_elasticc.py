"""ELAsTiCC's two releases have different columns, by which they are recognised, and different zero points."""

import pytest

from alert_broker.surveys import lsst
from alert_broker.surveys.base import survey_named, surveys
from alert_broker.surveys.elasticc import PHOTOMETRY
from tests.alert_broker.small import light_curve

RELEASED, EARLY = survey_named("elasticc"), survey_named("elasticc-v0")


def test_elasticc_releases_differ_in_zero_point():
    names = lsst.NAMES[1]
    packet = {"diaSource": dict(zip(names, (61_000.0, "Y", 100.0, 5.0), strict=True)), "prvDiaSources": None}
    packet["diaSource"] |= {"diaSourceId": 7, "diaObjectId": 5}
    packet["prvDiaForcedSources"] = None
    released, early = (light_curve(survey, packet) for survey in (RELEASED, EARLY))
    assert released.band.tolist() == early.band.tolist() == [5]
    assert early.flux.tolist() == [100.0]
    assert released.flux == pytest.approx([100.0 * 10 ** (-0.4 * 3.9)])


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"diaObject.hostgal_zphot_q010"}, ["elasticc"]),
        ({"diaObject.hostgal_zphot_q10"}, ["elasticc-v0"]),
        ({"diaObject.hostgal_zphot_q100"}, []),
        (set(), []),
    ],
)
def test_the_redshift_columns_tell_which_release_it_is(more, expected):
    columns = frozenset({*PHOTOMETRY, "objectId", *more})
    assert [name for name, survey in surveys().items() if survey.recognises_columns(columns)] == expected
    for name in PHOTOMETRY:
        assert not any(survey.recognises_columns(columns - {name}) for survey in surveys().values()), name


def test_only_a_replayed_table_is_recognised_by_its_schema():
    for survey in (RELEASED, EARLY):
        known = [name for name, other in surveys().items() if other.recognises_schema(survey.record)]
        assert known == [survey.name]
        assert survey.schema_id(survey.record) is None
    assert not RELEASED.recognises_schema("lsst.v7_1.alert")


@pytest.mark.parametrize("label", lsst.Lsst.labels)
def test_bands_have_lssts_order_and_a_capital_y(label):
    """A small y is not one of their bands, so its rows count as dropped."""
    packet = {"diaSource": dict(zip(lsst.NAMES[1], (61_000.0, label, 100.0, 5.0), strict=True))}
    packet["diaSource"] |= {"diaSourceId": 7, "diaObjectId": 5}
    packet |= {"prvDiaSources": None, "prvDiaForcedSources": None}
    curve = light_curve(RELEASED, packet)
    expected = ([], 1) if label == "y" else ([lsst.Lsst.bands.index(label)], 0)
    assert (curve.band.tolist(), curve.dropped) == expected
