"""Warn if an optimizer steps gradients that a clipper was to clip and did not.

The rule: the parameters that a clipper measures are those that the optimizer steps. It
imports `step` and the folders below it. Read `check.py` first.
"""
