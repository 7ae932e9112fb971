"""Measure and scale gradients: the rows of variables, their norms, scaled gradients.

This folder imports only `layouts`, which cuts variables into units. Read
`row_tensor.py` first, then `measure.py`.
"""
