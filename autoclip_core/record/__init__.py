"""Recording: one step's numbers, and a bounded store of the steps of a run.

It imports `checks` only. Read `store.py` first.
"""
