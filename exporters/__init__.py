"""Bundle in, files for a device out, each proved against the model it came from."""

from edgekit import __version__ as __edgekit__

__all__ = ["__edgekit__"]
