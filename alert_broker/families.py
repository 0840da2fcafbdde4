"""The model families that the alert broker adds to those of edgekit."""

from __future__ import annotations

from edgekit.bundle.family import Family

BRAAI = Family("braai", "alert_broker.cutouts.braai:build")
PLACED = Family("placed", "alert_broker.cutouts.placed:build")  # such as cutout-rb
