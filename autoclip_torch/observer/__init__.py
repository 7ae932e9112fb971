"""The base classes of clippers: rows, thresholds, checkpoints, present parameters.

This folder imports `step` and the folders below. Read `observer.py` first.
"""
