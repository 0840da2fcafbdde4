"""Compression techniques, one per file."""
