"""Kernels that scale many tensors of a device in one launch, written in Triton.

This folder imports nothing of the package, and only `scale.py` imports Triton. Read
`scale.py` first.
"""
