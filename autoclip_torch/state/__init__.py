"""The policy states of a clipper, on the CPU or on a device, and their checkpoints.

This folder imports `rows` and `gradients`. Read `policy_states.py` first.
"""
