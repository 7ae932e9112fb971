"""Measure and scale gradients: the norm of each row, and gradients times a scale.

`cpu.py` (NumPy) and `device.py` do both, and `sharded.py` measures over ranks; this
folder imports only `rows`, `kernels` and `optimizer_steps`. Read `cpu.py` first.
"""
