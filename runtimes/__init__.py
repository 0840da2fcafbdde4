"""Run what was exported."""

from edgekit import __version__ as __edgekit__

__all__ = ["__edgekit__"]
