"""edgekit: make a trained network run, fast and honestly, on hardware people already own."""

__version__ = "0.1.0"
