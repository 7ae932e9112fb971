"""One step: measure, decide and scale, with the checks of the run.

This folder imports `state`, `gradients`, `optimizer_steps` and `rows`. Read
`stepper.py` first.
"""
