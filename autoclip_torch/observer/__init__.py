"""What all clippers have: rows, thresholds, checkpoints, and the present parameters.

It imports `coverage` and the folders below it. Read `observer.py` first.
"""
