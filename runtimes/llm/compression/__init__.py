"""Compress language models: store their matrices in fewer bits, and measure what that changes."""
