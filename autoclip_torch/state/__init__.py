"""The policy state of a clipper, on the CPU or on a device, and its checkpoints.

It imports `rows` and `gradients`. Read `policy_states.py` first.
"""
