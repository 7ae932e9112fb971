"""Pictures of runs, with matplotlib.

It imports `files` and `record`. Read `run.py` first.
"""
