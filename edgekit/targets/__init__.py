"""Devices as data: one TOML profile each, which `profile.py` reads; `local.py` says which of them this machine is."""
