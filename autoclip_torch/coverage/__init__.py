"""Warn if a clipper does not measure the parameters that an optimizer steps.

It imports `step` and the folders below it. Read `check.py` first.
"""
