"""Devices as data: one TOML profile each, read by `profile.py`; what an operator costs on one is in `edgekit/cost.py`."""
