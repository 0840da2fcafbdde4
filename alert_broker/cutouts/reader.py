"""Read the images of many alerts into one array, the network's input. An image that cannot be read costs its alert the
score and nothing else; the reason is returned."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from alert_broker.cutouts.fits import (
    CUT_SHORT,
    MOST_HEADER,
    NO_FITS,
    NO_IMAGE,
    TOO_LARGE,
    ImageError,
    read_image,
)
from alert_broker.cutouts.inflate import BOMB, DAMAGED, Gunzip
from alert_broker.cutouts.tensors import CutoutTensors, Images
from alert_broker.packet_images import Triplet

LOG = logging.getLogger("edgekit.cutouts")
MISSING = "the packet lacks an image"
UNEXPECTED = "an image cannot be read"
REASONS = (MISSING, DAMAGED, BOMB, NO_FITS, CUT_SHORT, NO_IMAGE, TOO_LARGE, UNEXPECTED)
READ = -1  # the code of an alert whose images were read
PIXEL_BYTES = 8  # of the widest type
ROOM = 4  # a content may have this many times the bytes of the largest image and header: Rubin's hold three arrays
SHARE = 64  # alerts that a thread takes at once


class CutoutReader:
    """Makes `tensors`' inputs. threads: that decompress and read images; package: as in `Gunzip`."""

    def __init__(self, tensors: CutoutTensors, *, threads: int = 1, package: str | None = None) -> None:
        self.tensors = tensors
        self.gunzip = Gunzip(ROOM * (MOST_HEADER + PIXEL_BYTES * tensors.size**2), package)
        self._pool = ThreadPoolExecutor(threads, "edgekit-cutouts") if threads > 1 else None

    def __call__(self, images: Sequence[Triplet]) -> tuple[Images, npt.NDArray[np.int64]]:
        """Return the inputs, (alerts, ...) float32, and the code of each alert: READ, or the index of the reason among
        REASONS. The inputs of an alert that was not read have no meaning."""
        out = self.tensors.empty(len(images))
        codes = np.full(len(images), READ)

        def read(start: int) -> None:
            for alert in range(start, min(start + SHARE, len(images))):
                codes[alert] = self._read(images[alert], out[alert])

        starts = range(0, len(images), SHARE)
        if self._pool is None or len(images) <= SHARE:
            for start in starts:
                read(start)
        else:
            list(self._pool.map(read, starts))
        return out, codes

    def _read(self, triplet: Triplet, out: Images) -> int:
        try:
            for index, content in enumerate(triplet):
                if content is None:
                    return REASONS.index(MISSING)
                image = read_image(self.gunzip(content))
                if max(image.shape) > self.tensors.size:
                    return REASONS.index(TOO_LARGE)
                self.tensors.put(image, out, index)
        except ImageError as error:
            return REASONS.index(str(error))
        except Exception:  # one alert's images must never end the run
            LOG.exception("reading the images of an alert failed")
            return REASONS.index(UNEXPECTED)
        return READ
