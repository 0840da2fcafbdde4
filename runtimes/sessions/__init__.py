"""Sessions run a model: they take named arrays and return named arrays."""
