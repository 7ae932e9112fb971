"""Clipping inside `optimizer.step()`, also of parameters that are added later.

It imports `observer`, `step` and the folders below. Read `clipper_chain.py` first.
"""
