"""Warn if a clipper does not clip what is trained.

It imports `step` and the folders below it. Read `check.py` first.
"""
