"""The argument `gradient_transformers=` of an optimizer, and the step that calls them.

This folder imports `state`, `gradients` and `layouts`. Read `optimizer_mixin.py` first.
"""
