"""Clipping the change of the weights inside `optimizer.step()`.

It imports `hooks` and the folders below. Read `stepper.py` first.
"""
