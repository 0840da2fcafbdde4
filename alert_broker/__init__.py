"""Astronomical alerts: packets to light curves to classes."""

from edgekit import __version__ as __edgekit__

__all__ = ["__edgekit__"]
