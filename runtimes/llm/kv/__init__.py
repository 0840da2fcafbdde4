"""Policies of the key-value cache: what of a sequence's keys and values is kept, and how. One file to a policy."""
