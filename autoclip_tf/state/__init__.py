"""The settings and the state of a clipper, and how both are saved.

This folder imports `gradients` and `layouts`. Read `variables.py` first.
"""
