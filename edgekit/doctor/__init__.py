"""What this machine can run, and why not: `observe.py` looks, `checks.py` judges, `needs.py` is what a bundle asks."""
