"""The model families that the alert broker adds to those of edgekit."""

from __future__ import annotations

from edgekit.bundle.family import Family

BRAAI = Family("braai", "alert_broker.cutouts.braai:build")
CENTRAL = Family("central", "alert_broker.cutouts.central:build")  # such as cutout-rb
