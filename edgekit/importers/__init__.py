"""Models from elsewhere as bundles."""
