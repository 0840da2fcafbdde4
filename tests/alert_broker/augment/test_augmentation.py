"""Augmented light curves: the identity, the population that they follow, and that nothing but the seed decides."""

import sys

import numpy as np
import pytest

from alert_broker import plasticc
from alert_broker.augment import augmentation, files
from alert_broker.augment.augmentation import Catalogue, Sources, augmented, detected, observe
from alert_broker.augment.cosmology import FIDUCIAL
from alert_broker.augment.population import TARGETS
from alert_broker.augment.redshift import Move
from alert_broker.augment.visits import History, SampleHistories
from alert_broker.lightcurve import LightCurves
from edgekit.errors import EdgekitError
from tools import augment_plasticc

WAVELENGTHS = (3685.0, 4802.0, 6231.0, 7542.0, 8690.0, 9736.0)
IDS = sorted(plasticc.CLASSES)
IA, EB = IDS.index(90), IDS.index(16)
SKY = np.array([9.0, 2.5, 3.5, 6.0, 12.0, 28.0])


def sample(count=60, seed=0) -> plasticc.Plasticc:
    """Supernovae of one kind at redshift 0.05 to 0.5, seen every day, and a few eclipsing binaries."""
    rng = np.random.default_rng(seed)
    offsets, columns, labels, redshifts = [0], [], [], []
    for number in range(count):
        star = number % 10 == 9
        redshift = 0.0 if star else rng.uniform(0.05, 0.5)
        time = 59_800 + np.arange(0, 240, 1.0) + rng.uniform(0, 0.2, 240)
        band = rng.integers(0, 6, len(time)).astype(np.int8)
        if star:
            flux = -300.0 * (rng.random(len(time)) < 0.2)
        else:
            magnitude = rng.normal(-19.2, 0.4) + FIDUCIAL.distance_modulus(redshift)
            peak = 10 ** (0.4 * (27.5 - magnitude)) * np.array([0.3, 0.8, 1.0, 0.9, 0.8, 0.7])[band]
            phase = (time - 59_900 - rng.uniform(0, 60)) / (1 + redshift)
            flux = peak * np.exp(-0.5 * (phase / np.where(phase < 0, 8, 18)) ** 2)
        error = np.sqrt(SKY[band] ** 2 + np.abs(flux) / 50)
        flux = flux + error * rng.standard_normal(len(time))
        columns.append((time, band, flux, error, rng.random(len(time)) < (np.abs(flux) > 5 * error)))
        offsets.append(offsets[-1] + len(time))
        labels.append(EB if star else IA)
        redshifts.append(redshift)
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    curves = LightCurves(plasticc.BANDS, np.array(offsets), *joined)
    known = np.array(redshifts)
    photometric = np.stack([known * 1.02, 0.03 * (known > 0)], axis=1)
    return plasticc.Plasticc(
        curves, np.array(labels), photometric, 100 + np.arange(count), known, np.zeros(count, np.bool_)
    )


@pytest.fixture(scope="module")
def data() -> plasticc.Plasticc:
    return sample()


@pytest.fixture(scope="module")
def catalogue(data) -> Catalogue:
    return Catalogue.of(data, WAVELENGTHS, threads=1)


@pytest.fixture(scope="module")
def histories(data, catalogue) -> SampleHistories:
    return SampleHistories.of(data.curves, data.deep, catalogue.efficiency())


def own_history(curve: LightCurves) -> History:
    return History(
        curve.bands, np.array(WAVELENGTHS), curve.time, curve.band, SKY[curve.band], np.full(len(curve.time), 50.0)
    )


def normalised_residuals(catalogue, data, move_of):
    """Return the residuals of re-observed supernovae against the original points, by their common errors."""
    found = []
    # well measured sources, of which the process knows nearly every point
    for source in np.flatnonzero((data.label == IA) & (data.spectroscopic < 0.25))[:30]:
        original = catalogue.curves.take([source])
        history = own_history(original)
        move = move_of(float(catalogue.redshift[source]))
        rng = np.random.default_rng(int(source))
        again, _ = observe(catalogue, int(source), move, history, rng, peak_time=float(catalogue.peak_time[source]))
        assert len(again.time) > 0.9 * len(original.time)
        rows = np.searchsorted(original.time, again.time)
        found.append((again.flux - original.flux[rows]) / np.hypot(again.flux_error, original.flux_error[rows]))
    return np.concatenate(found)


def test_the_identity_reproduces_the_light_curve_within_the_noise(catalogue, data):
    """Same redshift, same visits: the new points differ from the old ones as two measurements do."""
    residuals = normalised_residuals(catalogue, data, lambda redshift: Move(redshift, redshift))
    assert abs(np.mean(residuals)) < 0.05
    assert 0.7 < np.std(residuals) < 1.05  # below 1, because the process is fitted to the old points
    assert np.mean(np.abs(residuals) > 3) < 0.01
    moved = normalised_residuals(catalogue, data, lambda redshift: Move(redshift, 1.2 * redshift))  # planted
    assert np.std(moved) > 1.5


def test_a_farther_source_is_fainter_and_slower(catalogue, data):
    source = int(np.argmin(np.where(data.label == IA, np.abs(data.spectroscopic - 0.2), 9)))
    redshift = float(data.spectroscopic[source])
    time = np.arange(59_700.0, 60_300.0, 0.5)
    quiet = History(
        plasticc.BANDS, np.array(WAVELENGTHS), time, np.full(len(time), 2, np.int8), np.full(len(time), 1e-3),
        np.full(len(time), 1e9),
    )  # fmt: skip

    def peak_and_width(new):
        one, _ = observe(catalogue, source, Move(redshift, new), quiet, np.random.default_rng(0), peak_time=60_000.0)
        bright = one.time[one.flux > 0.5 * one.flux.max()]
        return one.flux.max(), np.ptp(bright)

    (near, short), (far, long) = peak_and_width(redshift), peak_and_width(0.5)
    assert long / short == pytest.approx(1.5 / (1 + redshift), rel=0.1)
    dimming = 10 ** (0.4 * (FIDUCIAL.distance_modulus(0.5) - FIDUCIAL.distance_modulus(redshift)))
    assert near / far == pytest.approx(dimming, rel=0.6)  # up to the K-correction
    assert near / far > 4


def test_seed_class_and_number_decide_everything(catalogue, histories):
    sources = Sources(catalogue, IA)
    alone = augmented(catalogue, histories, sources, 7, 1)[0]
    [augmented(catalogue, histories, sources, number, 1) for number in range(3)]
    again = augmented(catalogue, histories, Sources(catalogue, IA), 7, 1)[0]
    assert alone.curves.flux.tolist() == again.curves.flux.tolist()
    assert alone.photometric.tolist() == again.photometric.tolist()
    for number, seed in ((8, 1), (7, 2)):
        assert (
            augmented(catalogue, histories, sources, number, seed)[0].curves.flux.tolist() != alone.curves.flux.tolist()
        )


def test_what_the_survey_would_not_find_is_not_kept(catalogue, histories, monkeypatch):
    new = files.join([augmented(catalogue, histories, Sources(catalogue, IA), n, 1)[0] for n in range(40)])
    found = np.bincount(new.curves.object_of_point[new.curves.detected], minlength=40)
    assert found.min() >= 2
    for number in range(40):
        one = new.curves.take([number])
        assert np.ptp(one.time[one.detected]) > augmentation.TWO_DETECTIONS_DAYS
    # what the noise lifts is no detection, as in PLAsTiCC
    assert detected(one, np.zeros(len(one.time)), histories, np.random.default_rng(0)) is None
    assert detected(one, np.full(len(one.time), 30.0), histories, np.random.default_rng(0)).detected.mean() > 0.9
    # without the cut, fainter sources would be kept
    monkeypatch.setattr(augmentation, "FAINTEST", 0.0)
    monkeypatch.setattr(augmentation, "detected", lambda one, *_: one)
    careless = [augmented(catalogue, histories, Sources(catalogue, IA), n, 1)[0] for n in range(40)]
    assert np.median([item.redshift for item in careless]) > np.median(new.redshift)


def test_stars_stay_in_our_galaxy(catalogue, histories, data):
    new = files.join([augmented(catalogue, histories, Sources(catalogue, EB), n, 1)[0] for n in range(20)])
    assert new.redshift.tolist() == new.photometric[:, 0].tolist() == [0.0] * 20
    assert (data.label[new.source] == EB).all()
    times = set(data.curves.time.tolist())
    assert set(new.curves.time.tolist()) <= times
    assert (
        augmented(catalogue, histories, Sources(catalogue, IDS.index(64)), 0, 1) is None
    )  # the sample has no kilonova


def test_sets_are_written_in_parts_and_not_mixed(tmp_path, catalogue, histories):
    parts = [augmented(catalogue, histories, Sources(catalogue, IA), number, 1)[0] for number in range(4)]
    files.claim_folder(tmp_path, {"seed": 1})
    files.save(tmp_path / "part-01.npz", files.join(parts[2:]))
    files.save(tmp_path / "part-00.npz", files.join(parts[:2]))
    read = files.load(tmp_path)
    assert read.curves.flux.tolist() == files.join(parts).curves.flux.tolist()
    assert read.object_id.tolist() == [int(part.object_id[0]) for part in parts]
    files.claim_folder(tmp_path, {"seed": 1})
    with pytest.raises(EdgekitError, match="other settings"):
        files.claim_folder(tmp_path, {"seed": 2})
    with pytest.raises(EdgekitError, match="augment_plasticc"):
        files.load(tmp_path / "empty")


@pytest.mark.realdata
def test_the_tool_continues_and_does_not_depend_on_the_order(shared_data, tmp_path, monkeypatch, capsys):
    """SN Ia of the real sample, 30 in all: a run that lost a part makes the same one again; the redshifts are those of
    a population that is farther than the sample, and none is beyond what an LSST visit shows."""
    monkeypatch.setattr(augment_plasticc, "PART", 15)
    arguments = ["--data", str(shared_data / "train"), "--split", "test", "--copies", "0", "--more", "30"]
    arguments += ["--more-of", "SNIa", "-o", str(tmp_path / "set")]
    monkeypatch.setattr(sys, "argv", ["augment_plasticc.py", *arguments])
    augment_plasticc.main()
    first = files.load(tmp_path / "set")
    lost = sorted((tmp_path / "set").glob("part-*"))[0]
    lost.unlink()
    augment_plasticc.main()
    assert "15 new light curves in 1 parts" in capsys.readouterr().out
    second = files.load(tmp_path / "set")
    assert first.curves.flux.tolist() == second.curves.flux.tolist()
    sample = plasticc.load(shared_data / "train")
    ours = sample.spectroscopic[(sample.label == IA) & (sample.split() == 1)]
    assert np.median(first.redshift) > 1.3 * np.median(ours)
    assert first.redshift.max() <= TARGETS[90].highest
    assert set(first.object_id) <= set(sample.object_id[sample.split() == 1])
