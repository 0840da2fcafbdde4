"""Each survey is one file beside the base class."""
