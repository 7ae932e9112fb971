"""How much of the gradients is clipped."""

NOTHING, ALL = "nothing clipped", "all clipped"
REGIMES = {NOTHING: 0.01, ALL: 100.0}
"""A gradient over its weight; the thresholds are at about 1."""
