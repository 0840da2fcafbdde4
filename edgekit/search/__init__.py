"""Search over recipes under constraints."""
