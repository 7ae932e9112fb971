"""Rates and numbers as text, for summaries, advice and titles."""

import math


def format_percent(rate: float) -> str:
    """Return a rate in [0, 1] as a percentage with 3 digits; "unknown" for NaN."""
    return "unknown" if math.isnan(rate) else f"{100 * rate:.3g} %"


def format_number(value: float) -> str:
    """Return a number with 4 digits; "unknown" for NaN."""
    return "unknown" if math.isnan(value) else f"{value:.4g}"
