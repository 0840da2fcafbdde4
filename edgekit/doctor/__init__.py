"""Say what this machine can run and why it cannot run the rest: `observe.py` collects facts about the machine,
`needs.py` lists what a bundle requires, and `checks.py` compares the two."""
