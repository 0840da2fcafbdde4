"""Data sets, and where their rows come from."""
