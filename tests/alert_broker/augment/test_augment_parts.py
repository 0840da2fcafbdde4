"""The parts of the augmentation against closed forms and against the compiled Gaussian process."""

import numpy as np
import pytest

from alert_broker.augment.cosmology import FIDUCIAL, LIGHT_SPEED, Cosmology
from alert_broker.augment.galactic import observe_again
from alert_broker.augment.photometric_redshift import PhotometricRedshifts
from alert_broker.augment.population import TARGETS, star_formation, thermonuclear
from alert_broker.augment.redshift import Move
from alert_broker.augment.surface import Surface
from alert_broker.augment.visits import SampleHistories, ZtfHistories, measured_efficiency
from alert_broker.gaussian_process import GaussianProcess
from alert_broker.lightcurve import LightCurves

LSST = (3685.0, 4802.0, 6231.0, 7542.0, 8690.0, 9736.0)
PLANCK, BOLTZMANN, LIGHT = 6.62607015e-34, 1.380649e-23, 2.99792458e18  # SI, and angstrom per second


def test_distances_of_universes_with_a_closed_form():
    """Matter alone (Einstein-de Sitter), and no matter (de Sitter)."""
    redshift = np.array([0.01, 0.5, 1.0, 3.0])
    unit = LIGHT_SPEED / 70.0
    einstein, de_sitter = Cosmology(matter=1.0), Cosmology(matter=0.0)
    np.testing.assert_allclose(
        einstein.comoving_distance(redshift), 2 * unit * (1 - 1 / np.sqrt(1 + redshift)), rtol=1e-6
    )
    np.testing.assert_allclose(de_sitter.comoving_distance(redshift), unit * redshift, rtol=1e-6)
    assert FIDUCIAL.luminosity_distance(1.0) == pytest.approx(6607.7, abs=0.5)  # Wright's calculator, 70, 0.3
    assert FIDUCIAL.luminosity_distance(1.0) != pytest.approx(float(einstein.luminosity_distance(1.0)), rel=0.1)


def test_the_volume_element_is_the_derivative_of_the_volume():
    redshift, step = np.array([0.2, 1.0]), 1e-4
    volume = (FIDUCIAL.comoving_distance(redshift + step) ** 3 - FIDUCIAL.comoving_distance(redshift - step) ** 3) / 3
    np.testing.assert_allclose(volume / (2 * step), FIDUCIAL.volume_element(redshift), rtol=1e-4)


def black_body(wavelength, temperature, redshift):
    """Return the flux density of a black body with the Sun's size at this redshift, up to a constant."""
    frequency = LIGHT / np.asarray(wavelength) * (1 + redshift)
    radiance = frequency**3 / np.expm1(PLANCK * frequency / (BOLTZMANN * temperature))
    return (1 + redshift) * radiance / FIDUCIAL.luminosity_distance(redshift) ** 2


def test_a_moved_black_body_is_the_black_body_at_the_other_redshift():
    """The K-correction against its closed form: 9,000 K at redshift 0.2, seen from redshift 0.35."""
    move = Move(0.2, 0.35)
    wavelength = np.array(LSST)
    moved = move.flux * black_body(move.old_wavelength(wavelength), 9_000.0, 0.2)
    np.testing.assert_allclose(moved, black_body(wavelength, 9_000.0, 0.35), rtol=1e-9)
    forgotten = move.flux * black_body(wavelength, 9_000.0, 0.2)  # planted: the light of the same filter
    assert np.abs(forgotten / black_body(wavelength, 9_000.0, 0.35) - 1).max() > 0.1


def test_the_surface_of_a_black_body_gives_its_k_correction():
    """Measured in six filters at redshift 0.2, a constant black body is predicted at redshift 0.3 to a per cent."""
    time = np.repeat(np.arange(0.0, 60.0, 3.0), 6)
    wavelength = np.tile(LSST, 20)
    scale = 1000.0 / black_body(6231.0, 7_000.0, 0.2)
    flux = scale * black_body(wavelength, 7_000.0, 0.2)
    surface = Surface(time, wavelength, flux, np.full(len(time), 1.0), np.log(1000.0**2), np.log(30.0**2))
    move = Move(0.2, 0.3)
    visible = np.array(LSST[1:])  # the light of u lies outside the six filters at the old redshift
    mean, spread = surface(np.full(5, 30.0), move.old_wavelength(visible))
    expected = scale * black_body(visible, 7_000.0, 0.3)
    np.testing.assert_allclose(move.flux * mean, expected, rtol=0.01)
    assert (spread < 0.1 * np.sqrt(surface.variance)).all()  # nine tenths of what it does not know a priori
    unmoved = scale * black_body(visible, 7_000.0, 0.2) * move.flux * move.stretch
    assert np.abs(unmoved / expected - 1).max() > 0.05  # without the K-correction


def test_time_is_dilated():
    move = Move(0.1, 0.65)
    old = move.old_time(np.array([100.0, 115.0]), 100.0, 5.0)
    np.testing.assert_allclose(old, [5.0, 5.0 + 15.0 * 1.1 / 1.65])
    assert Move(0.0, 0.0).flux == Move(0.3, 0.3).flux == 1.0
    assert Move(0.1, 0.2).flux < 1 < Move(0.2, 0.1).flux


def one_curve(seed=0, count=60):
    rng = np.random.default_rng(seed)
    time = np.sort(rng.uniform(0, 80, count))
    band = rng.integers(0, 6, count).astype(np.int8)
    flux = 200 * np.exp(-0.5 * ((time - 35) / 12) ** 2) * (1 + 0.1 * band) + rng.normal(0, 5, count)
    detected = np.abs(flux) > 25
    return LightCurves(tuple("ugrizy"), np.array([0, count]), time, band, flux, np.full(count, 5.0), detected)


def test_the_surface_is_the_compiled_process():
    curve = one_curve()
    process = GaussianProcess(LSST)
    found = process.interpolate(curve)
    parameters = float(found.fit.log_amplitude[0]), float(found.fit.log_metric[0])
    surface = Surface(curve.time, np.array(LSST)[curve.band], curve.flux, curve.flux_error, *parameters)
    grid = np.linspace(curve.time[0], curve.time[-1], 100)
    for band, wavelength in enumerate(LSST):
        mean, spread = surface(grid, np.full(100, wavelength))
        np.testing.assert_allclose(mean, found.mean[0, :, band], atol=1e-3)
        assert (spread > 0).all()
    far, spread = surface(np.array([1e5]), np.array([6000.0]))
    assert (abs(far[0]), spread[0]) == pytest.approx((0.0, np.sqrt(surface.variance)), abs=1e-6)
    other = Surface(curve.time, np.array(LSST)[curve.band], curve.flux, curve.flux_error, parameters[0], 2.0)
    assert np.abs(other(grid, np.full(100, 6231.0))[0] - found.mean[0, :, 2]).max() > 1


@pytest.mark.parametrize("identifier", TARGETS)
def test_redshifts_follow_rate_and_volume(identifier):
    """The share below a redshift, by direct integration, against the share of draws."""
    target = TARGETS[identifier]
    total, redshift = target.distribution(9.0)
    assert redshift[-1] == pytest.approx(target.highest)
    rng = np.random.default_rng(identifier)
    drawn = np.interp(rng.random(40_000), total, redshift)
    edge = 0.6 * target.highest
    grid = np.linspace(0.003, target.highest, 3001)
    density = target.rate(grid) * FIDUCIAL.volume_element(grid) / (1 + grid)
    expected = np.trapezoid(np.where(grid < edge, density, 0), grid) / np.trapezoid(density, grid)
    assert (drawn < edge).mean() == pytest.approx(expected, abs=0.01)
    wrong = np.trapezoid(np.where(grid < edge, density * grid, 0), grid) / np.trapezoid(density * grid, grid)
    assert abs(wrong - expected) > 0.02  # another rate would be seen


def test_luminosities_follow_their_functions():
    rng = np.random.default_rng(0)
    drawn = np.array([TARGETS[90].magnitude(rng) for _ in range(4000)])
    assert (drawn.mean(), drawn.std()) == pytest.approx((-19.05, 0.45), abs=0.03)
    mixture = np.array([TARGETS[42].magnitude(rng) for _ in range(8000)])
    assert mixture.mean() == pytest.approx(0.70 * -15.66 + 0.10 * -17.44 + 0.12 * -16.65 + 0.08 * -16.86, abs=0.06)
    assert TARGETS[95].magnitude(rng) is None
    assert star_formation(np.array([1.9]))[0] > 5 * star_formation(np.array([0.0]))[0]
    assert thermonuclear(np.array([0.999]))[0] == pytest.approx(thermonuclear(np.array([1.001]))[0], rel=0.05)


def test_photometric_redshifts_have_the_errors_of_hosts_nearby():
    rng = np.random.default_rng(0)
    true = rng.uniform(0.1, 1.0, 3000)
    photometric = true + 0.05 * (1 + true) * rng.standard_normal(3000)
    hosts = PhotometricRedshifts.of(true, np.stack([photometric, np.full(3000, 0.05)], axis=1))
    drawn = np.array([hosts.draw(0.5, rng) for _ in range(3000)])
    assert drawn[:, 0].mean() == pytest.approx(0.5, abs=0.01)
    assert drawn[:, 0].std() == pytest.approx(0.075, rel=0.15)
    assert PhotometricRedshifts.of(np.array([0.0, 0.2]), np.array([[0.0, 0.0], [0.3, 0.1]])).spectroscopic.tolist() == [
        0.2
    ]


def test_efficiency_is_the_share_of_detections():
    curve = one_curve(count=4000)
    centre, share = measured_efficiency(np.abs(curve.flux) / curve.flux_error, curve.detected)
    assert share[centre > 6].min() == 1.0
    assert share[centre < 4.5].max() == 0.0
    assert len(centre) == len(share) > 10


def test_histories_have_visits_noise_and_depth():
    rng = np.random.default_rng(1)
    curves = one_curve()
    faint = LightCurves(
        curves.bands, curves.offsets, curves.time, curves.band, 0.01 * curves.flux, curves.flux_error, curves.detected
    )
    efficiency = np.array([4.0, 6.0]), np.array([0.0, 1.0])
    sample = SampleHistories.of(faint, np.array([False]), efficiency)
    history = sample.draw(rng)
    assert history.time.tolist() == faint.time.tolist()
    np.testing.assert_allclose(history.sky, 5.0, rtol=0.02)
    assert sample.detection(np.array([3.0, 5.0, 9.0])).tolist() == [0.0, 0.5, 1.0]
    assert (
        len(SampleHistories.of(curves, np.array([False]), efficiency).curves) == 0
    )  # bright points do not show the sky
    ztf = ZtfHistories().draw(rng)
    depth = 27.5 - 2.5 * np.log10(5 * np.median(ztf.sky))
    assert 20.0 < depth < 21.3
    assert set(ztf.band) == {0, 1}
    assert ZtfHistories().detection(np.array([4.9, 5.1])).tolist() == [0.0, 1.0]


def test_a_star_is_observed_again_with_the_noise_of_the_new_field():
    rng = np.random.default_rng(2)
    curve = one_curve(count=400)
    history = ZtfHistories().draw(rng)
    time, band, flux, error, before = observe_again(curve, history, rng)
    assert 0 < len(time) < len(curve.time)
    assert set(time) <= set(curve.time)
    assert set(band) <= {0, 1, 2}  # ZTF has no u, z and y
    assert np.median(error) >= 0.9 * np.median(history.sky)
    assert len(flux) == len(band)
    assert 0.3 < np.std((flux - before) / error) <= 1.1
