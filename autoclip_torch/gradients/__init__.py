"""Measuring and scaling: the norm of each row, and gradients times a scale.

It imports `rows`. Read `measure.py` first.
"""
