"""The daemon: one process that owns a device, shares it among models, and serves them over HTTP."""
