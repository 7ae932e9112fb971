"""What a step may take, to `clip_grad_norm_`, and what it does with all the bytes."""

NOTHING, ALL = "nothing clipped", "all clipped"
REGIMES = {NOTHING: 0.01, ALL: 100.0}
"""A gradient over its weight; the thresholds are at about 1."""

GLOBAL = ("NormClip", "QuantileClip, global", "ZClip, global")
OWN = ("QuantileClip, per parameter", "StandardClip, per parameter")
UNITS = "AGC, per unit"
LARGE = ("ResNet-50", "GPT")

PASSES = {
    "one read": 1,
    "one product in place": 2,
    "one read, one product": 3,
    "two reads": 2,
    "two reads, one product": 4,
}
"""How often each passes over the bytes of all gradients; a product reads and writes."""


def target(contender: str, regime: str, model: str) -> float | None:
    """Return the most that a contender may take, or None where nothing is promised."""
    if contender in GLOBAL:
        return 0.6 if regime == NOTHING else 1.0
    if contender in OWN:
        return 1.3
    if contender == UNITS:
        return 1.5 if model in LARGE else 2.0
    return None


def limit(contender: str, regime: str) -> str:
    """Return what a contender has to do with all bytes, as `limits.py` names it."""
    reads = "two reads" if contender == UNITS else "one read"
    return reads if regime == NOTHING else f"{reads}, one product"
