"""Make a network's input from images: the preprocessing that a bundle of a cutout model names, with its parameters.

Source: Duev et al. 2019 (arXiv 1907.11259, section 3) and the code beside the published weights: NaN becomes 0, an
image is divided by its L2 norm, and an image smaller than the network's is padded below and to the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
from numba import njit

from edgekit.errors import EdgekitError, unknown

ID = "cutouts"
IMAGES = 3  # science, template, difference
ROWS, IMAGE = "rows", "image"
LARGEST_SIZE = 1024  # pixels along a side
PAD_VALUE = 1e-9
LARGEST_SUM = float(np.finfo(np.float32).max)
Images = npt.NDArray[np.float32]
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class CutoutTensors:
    """size: pixels along a side of the network's square images. norm: "rows" divides each row of an image by its L2
    norm (d6_m7), "image" divides the image by the norm of all its pixels (d6_m9). pad_value: of pixels outside a
    smaller image, after the division. channels: "last" gives (batch, side, side, 3), "first" (batch, 3, side, side).
    crop: the side of the central part that the network sees, after the division; 0 for all of it."""

    size: int = 63
    norm: Literal["rows", "image"] = "rows"
    pad_value: float = PAD_VALUE
    channels: Literal["last", "first"] = "last"
    crop: int = 0

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= LARGEST_SIZE:
            raise EdgekitError(f"cutouts: size = {repr(self.size)[:40]}; expected a whole number up to {LARGEST_SIZE}")
        if self.norm not in (ROWS, IMAGE):
            raise unknown("norm", str(self.norm)[:40], (ROWS, IMAGE), where="cutouts")
        if self.channels not in ("last", "first"):
            raise unknown("channels", str(self.channels)[:40], ("last", "first"), where="cutouts")
        if type(self.crop) is not int or not 0 <= self.crop <= self.size:
            raise EdgekitError(f"cutouts: crop = {repr(self.crop)[:40]}; expected a whole number up to {self.size}")
        if type(self.pad_value) not in (int, float) or not np.isfinite(self.pad_value):
            raise EdgekitError(f"cutouts: pad_value = {repr(self.pad_value)[:40]}; expected a finite number")

    @classmethod
    def from_bundle(cls, preprocessing: Mapping[str, Any] | None, source: str) -> CutoutTensors:
        """Return the preprocessing that a manifest names. Raises EdgekitError if it is not one of images."""
        given = dict(preprocessing or {})
        found = given.pop("id", None)
        if found != ID:
            raise EdgekitError(
                f"{source}: its preprocessing is {str(found)[:40]!r}; a model of cutouts has {ID!r}, as "
                "`edgekit import-braai` writes it"
            )
        needed = {item.name for item in fields(cls)} - {"crop"}
        if set(given) - {"crop"} != needed:
            raise EdgekitError(
                f"{source}: the preprocessing has the parameters {', '.join(sorted(given))[:200]}; expected "
                f"{', '.join(sorted(needed))}, and crop if the network sees a part"
            )
        try:
            return cls(**given)
        except EdgekitError as error:
            raise EdgekitError(f"{source}: {error}") from None

    def to_bundle(self) -> dict[str, Any]:
        found = {"id": ID, **asdict(self)}
        if not self.crop:
            del found["crop"]  # bundles of before have none
        return found

    @property
    def side(self) -> int:
        """Pixels along a side of the input."""
        return self.crop or self.size

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one alert's input."""
        return (self.side, self.side, IMAGES) if self.channels == "last" else (IMAGES, self.side, self.side)

    def empty(self, alerts: int) -> Images:
        return np.empty((alerts, *self.shape), np.float32)

    def put(self, image: npt.NDArray[np.generic], out: Images, image_index: int) -> None:
        """Write an image, (height, width) of at most (size, size), as input number `image_index` (0 to 2) of one alert:
        out has `shape`."""
        target = out[..., image_index] if self.channels == "last" else out[image_index]
        stored = np.ascontiguousarray(image, ">f4").view(np.uint32)  # without a copy for the images of FITS files
        whole = np.empty((self.size, self.size), np.float32) if self.crop else target
        _put(stored, whole, self.norm == ROWS, self.pad_value)
        if self.crop:
            start = (self.size - self.crop) // 2
            target[...] = whole[start : start + self.crop, start : start + self.crop]

    def warm_up(self) -> None:
        """Load the compiled loop from numba's cache, or compile it."""
        self.put(np.zeros((1, 1), np.float32), self.empty(1)[0], 0)

    def __call__(self, images: npt.NDArray[np.generic]) -> Images:
        """Return the inputs of images (alerts, 3, height, width)."""
        out = self.empty(len(images))
        for alert, triplet in enumerate(images):
            for index, image in enumerate(triplet):
                self.put(image, out[alert], index)
        return out


def _compiled(function: Function) -> Function:
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))


@_compiled
def _put(stored: npt.NDArray[np.uint32], out: Images, by_row: bool, pad_value: float) -> None:
    """See CutoutTensors.put. stored: big-endian float32. ZTF's own scores come from float32: if a sum of squares is
    beyond float32, the norm is infinite, so the row or the image becomes 0. Some reference images hold -3.4e38 where
    they have no pixel."""
    height, width = stored.shape
    row = np.empty(width, np.float32)  # contiguous, so that loops over it become vector instructions
    scale = 0.0
    if not by_row:
        total = 0.0
        for y in range(height):
            _read(stored, y, row)
            total += _squares(row)
        scale = _scale(total)
    for y in range(height):
        _read(stored, y, row)
        if by_row:
            scale = _scale(_squares(row))
        if scale > 0.0:
            for x in range(width):
                row[x] = np.float32(np.float64(row[x]) * scale)
        else:
            row[:] = 0.0
        for x in range(width):
            out[y, x] = row[x]
        for x in range(width, out.shape[1]):
            out[y, x] = np.float32(pad_value)
    for y in range(height, out.shape[0]):
        for x in range(out.shape[1]):
            out[y, x] = np.float32(pad_value)


@_compiled
def _read(stored: npt.NDArray[np.uint32], y: int, row: Images) -> None:
    """Read a row of pixels, whose bytes are in the other order; NaN becomes 0."""
    low = np.uint32(0xFF00FF)
    for x in range(len(row)):
        pairs = ((stored[y, x] & low) << np.uint32(8)) | ((stored[y, x] >> np.uint32(8)) & low)
        value = np.uint32((pairs << np.uint32(16)) | (pairs >> np.uint32(16))).view(np.float32)
        row[x] = np.float32(0.0) if np.isnan(value) else value


@_compiled
def _squares(row: Images) -> float:
    """Return the sum of squares, as four sums that the processor adds at the same time."""
    first, second, third, fourth = 0.0, 0.0, 0.0, 0.0
    whole = len(row) // 4 * 4
    for x in range(0, whole, 4):
        first += np.float64(row[x]) ** 2
        second += np.float64(row[x + 1]) ** 2
        third += np.float64(row[x + 2]) ** 2
        fourth += np.float64(row[x + 3]) ** 2
    for x in range(whole, len(row)):
        first += np.float64(row[x]) ** 2
    return (first + second) + (third + fourth)


@_compiled
def _scale(total: float) -> float:
    """Return 1 / the norm; 0 if it is beyond float32. A norm of 0 leaves the zeros."""
    if total > LARGEST_SUM:
        return 0.0
    return 1.0 / np.sqrt(total) if total > 0.0 else 1.0
