"""Import models from other frameworks and files as bundles."""
