"""One base, one file per survey."""
