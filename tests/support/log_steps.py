"""Recorded steps of one row, for the rules of a log's summary."""

import numpy as np

from autoclip_core.record.store import STEP


def steps_of(steps, thresholds, clipped=0.0, norm=1.0):
    """Return recorded steps; each argument is one number or one per step."""
    table = np.zeros(len(steps), STEP)
    table["step"], table["threshold"] = steps, thresholds
    table["clipped"], table["norm"] = clipped, norm
    table["finite"] = np.isfinite(table["norm"])
    return table
