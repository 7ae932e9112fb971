"""Measure and scale gradients: the norm of each row, and gradients times a scale.

`cpu.py` (NumPy), `device.py` and `sharded.py` (DTensors) offer the same two functions;
this folder imports only `rows`. Read `cpu.py` first.
"""
