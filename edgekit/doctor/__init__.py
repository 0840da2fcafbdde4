"""What this machine can run, and why not: `system.py` observes, `checks.py` judges, `needs.py` says what a bundle asks."""
