"""How much of the gradients is clipped, and how often the limits pass over them."""

NOTHING, ALL = "nothing clipped", "all clipped"
REGIMES = {NOTHING: 0.01, ALL: 100.0}
"""A gradient over its weight; the thresholds are at about 1."""

PASSES = {
    "one read": 1,
    "one product in place": 2,
    "one read, one product": 3,
    "two reads": 2,
    "two reads, one product": 4,
}
"""How often each passes over the bytes of all gradients; a product reads and writes."""
