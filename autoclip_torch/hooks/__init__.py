"""Clipping inside `optimizer.step()`, and what follows a model that changes.

It imports `observer` and what lies below it. Read `attach.py` first.
"""
