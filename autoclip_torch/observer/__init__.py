"""The base classes of clippers: rows, thresholds, checkpoints and losses.

This folder imports `step` and the folders below. Read `observer.py` first.
"""
