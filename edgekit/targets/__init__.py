"""Devices as data: one TOML profile each, which `profile.py` reads, and the decisions that follow from a profile."""
