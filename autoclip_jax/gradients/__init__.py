"""Measures and scales the updates: which leaf has which rows, norms, scaled updates.

It imports nothing else of this package. Read `rows.py` first, then `measure.py`.
"""
