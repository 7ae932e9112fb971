"""Measure and scale gradients: the norm of each row, and gradients times a scale.

`cpu.py`, `device.py` and `sharded.py` do the same for plain CPU tensors, accelerators
and DTensors. This folder imports only `rows`. Read `cpu.py` first.
"""
