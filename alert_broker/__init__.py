"""Read astronomical alert packets, extract their light curves and classify them, from files or from a stream."""

from edgekit import __version__ as __edgekit__

__all__ = ["__edgekit__"]
