"""The C exporter's parts: a network as kernel calls, those as C text, and that text compiled and loaded."""
