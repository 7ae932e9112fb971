"""One step: measure, decide, scale, and the checks around it.

It imports `state`, `gradients` and `rows`. Read `stepper.py` first.
"""
