"""Classify the three images of an alert: inflate and read them, make tensors, and run a network on them."""
