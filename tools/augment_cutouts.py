"""Make cutouts that nobody observed: changed copies of real triplets, and simulated ones, for tools/train_cutout_rb.py.

A triplet is (3, height, width) float32: science, template and difference. Each change keeps to what happens to images:
the night has another seeing, a source is fainter, a satellite crosses, a pixel is hot, the subtraction fails. What the
result shows is for the teacher to say, so no change needs to know whether it makes a source or an artefact. Pixels
without a value keep what they hold.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Image = npt.NDArray[np.float64]
Batch = npt.NDArray[np.float32]
Random = np.random.Generator
SIZE = 63  # pixels along a side
NO_VALUE = 1e30  # beyond it, a pixel of a reference image means that there is none
MOST_CHANGES = 3
UNCHANGED = 0.4  # share of copies that are only turned and mirrored; `varied` changes those as well
WITHOUT_EDGE, WITHOUT_BLOCK = 0.1, 0.1  # shares of changed copies that lose pixels


def copy_of(triplet: npt.NDArray[np.float32], other: npt.NDArray[np.float32], rng: Random) -> npt.NDArray[np.float32]:
    """Return a changed copy of a triplet. other: a triplet whose sources may be added to it."""
    images, second = turned(triplet.astype(np.float64), rng), turned(other.astype(np.float64), rng)
    return images.astype(np.float32) if rng.random() < UNCHANGED else changed(images, second, rng)


def changed(images: Image, second: Image, rng: Random) -> npt.NDArray[np.float32]:
    """Apply one to MOST_CHANGES changes, and then perhaps take pixels away."""
    work, other = filled(images), filled(second)
    for number in rng.permutation(len(CHANGES))[: rng.integers(1, MOST_CHANGES + 1)]:
        work = CHANGES[number](work, other, rng)
    work = with_missing(images, work)
    if rng.random() < WITHOUT_EDGE:
        work = cut_edge(work, rng)
    if rng.random() < WITHOUT_BLOCK:
        y, x = rng.integers(SIZE, size=2)
        work[:, y : y + rng.integers(4, 24), x : x + rng.integers(4, 24)] = np.nan
    return work.astype(np.float32)


def varied(images: Batch, partners: npt.NDArray[np.intp], rng: Random) -> Batch:
    """Return a variant of each of many triplets, (rows, 3, SIZE, SIZE), by the changes that need no interpolation: all
    are turned or mirrored alike, and each is shifted by up to a pixel, gets another noise and brightness, and every
    third one some of the sources of its partner. partners: a row for each row."""
    valid = np.abs(images) < NO_VALUE
    work = np.where(valid, images, 0)
    rows = len(images)
    sample = work[:, :, ::3, ::3].reshape(rows, 3, -1)
    sky = np.median(sample, axis=2, keepdims=True)
    noise = 1.4826 * np.median(np.abs(sample - sky), axis=2)[..., None, None]
    above = np.where(valid, work - sky[..., None], 0)[partners]
    share = np.where(rng.random(rows) < 1 / 3, np.exp(rng.uniform(np.log(0.05), 0.0, rows)), 0.0)
    brighter = np.where(rng.random(rows) < 0.5, np.exp(rng.normal(-0.2, 0.5, rows)), 1.0)
    sizes = np.where(rng.random(rows) < 0.7, rng.uniform(0.0, 0.6, rows), 0.0)
    found = images + column(share) * above
    found[:, 0] += column(brighter - 1)[:, 0] * work[:, 2]
    found[:, 2] += column(brighter - 1)[:, 0] * work[:, 2]
    found += column(sizes) * noise * rng.standard_normal(images.shape, np.float32)
    for row, (y, x) in enumerate(rng.integers(-1, 2, (rows, 2))):
        found[row] = np.roll(found[row], (y, x), axis=(1, 2))
    found = np.rot90(found, rng.integers(4), axes=(2, 3))
    found = found[..., ::-1] if rng.random() < 0.5 else found
    return np.ascontiguousarray(found, np.float32)


def column(values: npt.NDArray[np.float64]) -> Batch:
    """A number for each row of a batch."""
    return values.astype(np.float32)[:, None, None, None]


def with_missing(images: Image, work: Image) -> Image:
    """Return `work` with the pixels of `images` that have no value."""
    return np.where(np.abs(images) < NO_VALUE, work, images)


def turned(images: Image, rng: Random) -> Image:
    """Turn by a multiple of 90 degrees, and mirror every second time."""
    images = np.rot90(images, rng.integers(4), axes=(1, 2))
    return np.ascontiguousarray(images[:, :, ::-1] if rng.random() < 0.5 else images)


def filled(images: Image) -> Image:
    """Give each pixel without a value the median of its image."""
    valid = np.where(np.abs(images) < NO_VALUE, images, np.nan)
    middle = [np.nanmedian(image) if np.isfinite(image).any() else 0.0 for image in valid]
    return np.where(np.isnan(valid), np.array(middle)[:, None, None], valid)


def spread(image: Image) -> float:
    """Return the noise of an image as a standard deviation, from the median absolute deviation; at least 1."""
    return max(1.0, 1.4826 * float(np.median(np.abs(image - np.median(image)))))


def log_uniform(rng: Random, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def point(rng: Random, y: float, x: float, fwhm: float, axis_ratio: float = 1.0) -> Image:
    """A point source of peak 1 at (y, x) pixels from the centre: Moffat's profile with beta 3.5 (Moffat 1969)."""
    beta, angle = 3.5, rng.uniform(0, np.pi)
    dy, dx = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    along = (dx - x) * np.cos(angle) + (dy - y) * np.sin(angle)
    across = ((dy - y) * np.cos(angle) - (dx - x) * np.sin(angle)) / axis_ratio
    width = fwhm / (2 * np.sqrt(2 ** (1 / beta) - 1))
    profile: Image = (1 + (along**2 + across**2) / width**2) ** -beta
    return profile


def somewhere(rng: Random) -> tuple[float, float]:
    """A position that is near the centre every second time."""
    reach = 3.0 if rng.random() < 0.5 else SIZE / 2
    y, x = rng.uniform(-reach, reach, 2)
    return float(y), float(x)


def shifted(images: Image, second: Image, rng: Random) -> Image:
    by = rng.uniform(-1.5, 1.5, 2)
    return np.stack([ndimage.shift(image, by, order=3, mode="nearest") for image in images])


def rotated(images: Image, second: Image, rng: Random) -> Image:
    angle = rng.uniform(-45, 45)
    return np.stack([ndimage.rotate(image, angle, reshape=False, order=3, mode="reflect") for image in images])


def other_seeing(images: Image, second: Image, rng: Random) -> Image:
    """Blur the science image, and the difference by the same change, or not, as if the subtraction had not seen it."""
    science, template, difference = images
    noise = spread(science)
    blurred = ndimage.gaussian_filter(science, rng.uniform(0.3, 1.5)) + rng.normal(0, 0.7 * noise, science.shape)
    matched = blurred - science if rng.random() < 0.6 else ndimage.gaussian_filter(difference, 0.7) - difference
    return np.stack([blurred, template, difference + matched])


def other_brightness(images: Image, second: Image, rng: Random) -> Image:
    """Make all that changed brighter or fainter, and leave the noise as it is."""
    science, template, difference = images
    factor = log_uniform(rng, 0.05, 3.0)
    lost = np.sqrt(max(0.0, 1 - factor**2)) * rng.normal(0, spread(difference), difference.shape)
    return np.stack([science + (factor - 1) * difference, template, factor * difference + lost])


def noisier(images: Image, second: Image, rng: Random) -> Image:
    noise = rng.normal(0, 1, images.shape)
    sizes = [log_uniform(rng, 0.1, 2.0) * spread(image) for image in images]
    noise[2] = 0.7 * noise[0] + 0.7 * noise[2]
    return images + noise * np.array(sizes)[:, None, None]


def with_star(images: Image, second: Image, rng: Random) -> Image:
    """Add a star to science and difference, or to science and template with what a subtraction leaves of it."""
    (y, x), width = somewhere(rng), rng.uniform(1.6, 5.0)
    peak = log_uniform(rng, 3.0, 100.0) * spread(images[2])
    star = peak * point(rng, y, x, width, rng.uniform(0.7, 1.0))
    if rng.random() < 0.5:
        return images + np.stack([star, 0 * star, star])
    moved = peak * point(rng, y + rng.normal(0, 0.4), x + rng.normal(0, 0.4), width * rng.uniform(0.85, 1.15))
    return images + np.stack([star, moved, star - moved])


def with_dipole(images: Image, second: Image, rng: Random) -> Image:
    """Add a pair of a positive and a negative source to the difference: a badly aligned subtraction."""
    (y, x), width = somewhere(rng), rng.uniform(1.6, 4.0)
    peak = log_uniform(rng, 3.0, 100.0) * spread(images[2])
    dy, dx = rng.uniform(-1.5, 1.5, 2)
    pair = point(rng, y, x, width) - rng.uniform(0.5, 1.5) * point(rng, y + dy, x + dx, width)
    return images + np.stack([0 * pair, 0 * pair, peak * pair])


def with_hot_pixels(images: Image, second: Image, rng: Random) -> Image:
    """Add a hot pixel or the track of a cosmic ray to science and difference."""
    hit = np.zeros((SIZE, SIZE))
    y, x = (np.array(somewhere(rng)) + (SIZE - 1) / 2).astype(int)
    dy, dx = rng.integers(-1, 2, 2)
    for step in range(rng.integers(1, 6)):
        if 0 <= (row := y + step * dy) < SIZE and 0 <= (column := x + step * dx) < SIZE:
            hit[row, column] += rng.uniform(0.5, 1.0)
    hit *= log_uniform(rng, 5.0, 300.0) * spread(images[2]) * (1 if rng.random() < 0.8 else -1)
    return images + np.stack([hit, 0 * hit, hit])


def with_streak(images: Image, second: Image, rng: Random) -> Image:
    """Add the trail of a satellite to science and difference, or to the template, with the opposite sign."""
    dy, dx = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    angle, off = rng.uniform(0, np.pi), rng.normal(0, 8.0)
    away = dx * np.cos(angle) + dy * np.sin(angle) - off
    trail = log_uniform(rng, 2.0, 60.0) * spread(images[2]) * np.exp(-(away**2) / (2 * rng.uniform(0.6, 2.0) ** 2))
    parts = [trail, 0 * trail, trail] if rng.random() < 0.8 else [0 * trail, trail, -trail]
    return images + np.stack(parts)


def with_bad_lines(images: Image, second: Image, rng: Random) -> Image:
    """Add an offset to a few columns or rows of science and difference."""
    line = np.zeros(SIZE)
    start = rng.integers(SIZE)
    line[start : start + rng.integers(1, 4)] = rng.choice([-1, 1]) * log_uniform(rng, 1.0, 30.0) * spread(images[2])
    lines = np.tile(line, (SIZE, 1))
    lines = lines.T if rng.random() < 0.5 else lines
    return images + np.stack([lines, 0 * lines, lines])


def with_saturation(images: Image, second: Image, rng: Random) -> Image:
    """Add a saturated star to science and template; nothing of its core can be subtracted."""
    y, x = somewhere(rng)
    level = log_uniform(rng, 5e3, 5e4)
    star = log_uniform(rng, 1.0, 30.0) * level * point(rng, y, x, rng.uniform(2.0, 4.0))
    core = star > level
    rest = np.where(core, rng.normal(0, 0.3 * level, core.shape), rng.normal(0, 0.03, core.shape) * star)
    return images + np.stack([np.minimum(star, level), np.minimum(star, level), rest])


def with_ring(images: Image, second: Image, rng: Random) -> Image:
    """Add a source whose profile the subtraction gets wrong: a ring around a core of the other sign."""
    y, x = somewhere(rng)
    width, peak = rng.uniform(1.6, 4.0), log_uniform(rng, 5.0, 300.0) * spread(images[2])
    first, last = point(rng, y, x, width), point(rng, y, x, width * rng.uniform(1.1, 1.8))
    last *= first.sum() / last.sum() * rng.uniform(0.8, 1.2)
    gap = peak * (first - last) * rng.choice([-1, 1])
    return images + np.stack([peak * first, peak * first, gap])


def with_other_sources(images: Image, second: Image, rng: Random) -> Image:
    """Add what another triplet has above its sky."""
    above = second - np.median(second, axis=(1, 2), keepdims=True)
    return images + log_uniform(rng, 0.1, 2.0) * above


def of_two(images: Image, second: Image, rng: Random) -> Image:
    """Take the difference, or science and template, from another triplet."""
    return np.stack([*second[:2], images[2]]) if rng.random() < 0.5 else np.stack([images[0], second[1], images[2]])


def reversed_in_time(images: Image, second: Image, rng: Random) -> Image:
    """Exchange science and template, and the sign of what changed."""
    return np.stack([images[1], images[0], -images[2]])


def cut_edge(images: Image, rng: Random) -> Image:
    """Take the pixels along one side away: in all images, or in one that then holds zeros there."""
    turns, width = int(rng.integers(4)), int(rng.integers(1, 30))
    images = np.rot90(images, turns, axes=(1, 2)).copy()
    if rng.random() < 0.7:
        images[:, :, :width] = np.nan
    else:
        images[rng.integers(3), :, :width] = 0.0
    return np.rot90(images, -turns, axes=(1, 2))


CHANGES: tuple[Callable[[Image, Image, Random], Image], ...] = (
    shifted, rotated, other_seeing, other_brightness, noisier, with_star, with_dipole, with_hot_pixels, with_streak,
    with_bad_lines, with_saturation, with_ring, with_other_sources, of_two, reversed_in_time,
)  # fmt: skip


def simulated(rng: Random) -> npt.NDArray[np.float32]:
    """Return a triplet of point sources and galaxies on a noisy sky, every second time with a source that changed at
    the centre. Bright sources leave a residual in the difference."""
    noise, deep = log_uniform(rng, 4.0, 20.0), log_uniform(rng, 0.5, 5.0)
    widths = rng.uniform(1.8, 4.0), rng.uniform(1.8, 3.0)
    science, template, difference = (rng.normal(0, size, (SIZE, SIZE)) for size in (noise, deep, 0.0))
    difference = difference + science + template
    for _ in range(rng.poisson(3)):
        (y, x), peak = somewhere(rng), log_uniform(rng, 3.0, 2000.0) * noise
        ratio, wider = (1.0, 1.0) if rng.random() < 0.6 else (rng.uniform(0.3, 1.0), rng.uniform(1.2, 4.0))
        state = rng.bit_generator.state  # a galaxy has the same angle in both images
        source = peak * point(rng, y, x, wider * widths[0], ratio)
        rng.bit_generator.state = state
        before = peak * point(rng, y, x, wider * widths[1], ratio)
        moved = ndimage.shift(source, rng.normal(0, 0.15, 2), order=1, mode="nearest")
        science, template = science + source, template + before
        difference = difference + source - rng.normal(1, 0.02) * moved
    if rng.random() < 0.6:
        y, x = rng.normal(0, 0.5, 2)
        source = log_uniform(rng, 3.0, 300.0) * noise * point(rng, y, x, widths[0], rng.uniform(0.8, 1.0))
        science, difference = science + source, difference + source
    sky = log_uniform(rng, 30.0, 1000.0)
    return np.stack([science + sky, template + sky, difference]).astype(np.float32)
