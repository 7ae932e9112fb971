"""The share of a training step that each way to clip takes, in all frameworks.

`share.py`, `jax_steps.py` and `keras_steps.py` find the shares; `page.py` joins the
rows of their tables.
"""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from layout import Rows, seconds
from regimes import REGIMES
from timing import Times, spread

NO_CLIPPING = "no clipping"
FIXED, GLOBAL = "fixed clip", "QuantileClip, global"
EACH, UNIT, TRUST = "QuantileClip, per parameter", "AGC, per unit", "TrustClip"
WAYS = (FIXED, TRUST, GLOBAL, EACH, UNIT)
"""The columns; "fixed clip" is that of the framework itself."""
SMALLEST = "one layer"
"""A model with 10 500 parameters in 2 tensors: what clipping adds is a fixed cost."""


def find_shares(steps: Times, names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the seconds of a step without clipping, and the share of each way to clip.

    Args:
      steps: the seconds of whole steps, in the same rounds; "no clipping" among them.
      names: of the steps that clip in each way, one or one for each regime. Those that
        were not timed are left out.
    """
    without = steps[NO_CLIPPING]
    result: dict[str, Any] = {"seconds": median(without)}
    for way, of_way in names.items():
        timed = [steps[name] for name in of_way if name in steps]
        pairs = [zip(without, times, strict=True) for times in timed]
        result[way] = [spread([1 - a / b for a, b in x])._asdict() for x in pairs]
    return result


def share_tables(
    framework: str, shares: Mapping[str, Mapping[str, Any]]
) -> dict[str, Rows]:
    """Return a row per model: the step without clipping, then the shares in percent.

    The fixed cost is the time that each way adds to a step of the smallest model.
    """
    percent = [[", ".join(REGIMES), "a step", *WAYS]]
    added = [["microseconds", *WAYS]]
    for model, result in shares.items():
        without = result["seconds"]
        medians = [[x["median"] for x in result.get(way, ())] for way in WAYS]
        if model == SMALLEST:
            times = ([1e6 * without * x / (1 - x) for x in each] for each in medians)
            added.append([framework, *(cell(each, 0) for each in times)])
        else:
            cells = (cell([100 * x for x in each], 1) for each in medians)
            percent.append([f"{framework}, {model}", seconds(without), *cells])
    return {"share": percent, "fixed cost": added}


def cell(numbers: Sequence[float], digits: int) -> str:
    """Return the numbers of all regimes."""
    return ", ".join(f"{number:.{digits}f}" for number in numbers)
