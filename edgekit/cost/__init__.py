"""What a model costs: operations, bytes, memory and time, counted, measured or estimated."""
