"""Check at which place of a training loop a clipper steps.

It imports `step` and the folders below it. Read `loop_check.py` first.
"""
