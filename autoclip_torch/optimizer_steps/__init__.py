"""How torch runs the steps of all optimizers: hooks for them, and which of them run.

This folder imports nothing of the package. Read `open_steps.py` first.
"""
