"""Architectures under constraints: `edgekit search`."""
