"""Devices as data: one TOML profile each, read by `profile.py`, and what a graph costs on one."""
