"""Measure what each policy does to series of norms whose answer is known.

Run it as `python benchmarks/controller.py`: it prints a table of all policies; with
`--write` it puts the rows of `SHOWN` into docs/controller.md. No network is trained,
everything is drawn from one seed, and all series are rows of one run per policy. It
takes under a minute.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import autoclip_core
from autoclip_core import Policy, decide

PAGE = Path(__file__).parents[1] / "docs" / "controller.md"
"""The page that holds the table of `SHOWN`."""

STEPS, ROWS = 4000, 8
SETTLED = 1000
"""Steps until the longest window is full; what comes before is not counted."""
SHIFT = 1500
"""The step of the change of level."""
LOG_STDS = (0.1, 0.3, 0.5, 1.0)
OCTAVES = 13

POLICIES = {
    "Fixed(1.0)": "",
    "Fixed(5.0)": "",
    "ParamRatio(0.01)": "AGC",
    "Quantile(0.9)": "",
    "Quantile(0.5)": "",
    "Quantile(0.95, history_length=128)": "",
    "Quantile(0.1, history_length=None, include_current=True)": "AutoClip's paper",
    "Quantile(0.05, history_length=100, include_current=True)": "bitsandbytes' 5",
    "StreamingQuantile(0.9)": "",
    "StreamingQuantile(0.5)": "",
    "MeanStd()": "",
    "MeanStd(2.0, log=True, history_length=200)": "",
    "MeanStd(4.0, log=True, history_length=200)": "",
    "ZScore()": "",
    "ZScore(record='applied')": "ZClip's paper",
    "ZScore(target='mean', record='applied')": "ZClip's paper",
    "EmaRatio()": "AdaGC's paper",
    "EmaRatio(2.0)": "",
    "Drop(MeanStd(6.0, history_length=128))": "",
    "Warmup(StreamingQuantile(0.9), steps=100, threshold=1.0)": "",
    "Cap(StreamingQuantile(0.9), max_norm=1.0)": "",
    "Floor(StreamingQuantile(0.9), min_norm=1.0)": "",
}
"""The policies, as expressions in the names of `autoclip_core`, and their papers."""

SHOWN = (
    "Quantile(0.9)",
    "Quantile(0.1, history_length=None, include_current=True)",
    "StreamingQuantile(0.9)",
    "MeanStd()",
    "MeanStd(2.0, log=True, history_length=200)",
    "ZScore()",
    "ZScore(record='applied')",
    "EmaRatio()",
    "EmaRatio(2.0)",
)
"""The policies of the page."""


class Taken(NamedTuple):
    """What a policy did to one series; arrays of shape (STEPS, ROWS)."""

    norms: np.ndarray
    thresholds: np.ndarray
    scales: np.ndarray
    clipped: np.ndarray


Run = Mapping[str, Taken]
"""By the name of the series."""


# The series: mean 1 where nothing else is said.


def make_series() -> dict[str, np.ndarray]:
    """Return all series by name, each of shape (STEPS, ROWS)."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((STEPS, ROWS))
    series = {
        f"log-std {s}": np.exp(s * noise - s * s / 2).astype(np.float32)
        for s in LOG_STDS
    }
    # Those below differ from this one in what they are named for, and in nothing else.
    steady = series["log-std 0.3"]
    time = np.arange(STEPS)[:, None]
    spiked = rng.random(steady.shape) < 0.005
    return series | {
        "spikes": np.where(spiked, 50, 1).astype(np.float32) * steady,
        "drift ÷100": steady * np.float32(100.0 ** (-time / STEPS)),
        "drift ×10": steady * np.float32(10.0 ** (time / STEPS)),
        "shift ×10": steady * np.where(time < SHIFT, 1, 10).astype(np.float32),
        "shift ÷10": steady / np.where(time < SHIFT, 1, 10).astype(np.float32),
        "loss ×2^k": steady * np.float32(2.0**OCTAVES),
        "loss ÷2^k": steady * np.float32(2.0**-OCTAVES),
        "NaN, Inf": with_gaps(steady),
    }


def with_gaps(steady: np.ndarray) -> np.ndarray:
    """Return the same norms with NaN and infinities between them, also at the start."""
    series = np.where(np.arange(STEPS)[:, None] % 2, np.inf, np.nan).repeat(ROWS, 1)
    known = known_steps()
    series[known] = steady[: known.sum()]
    return series.astype(np.float32)


def known_steps() -> np.ndarray:
    """Return which steps of that series have a finite norm; 19 of 20 have one."""
    known = np.random.default_rng(1).random(STEPS) >= 0.05
    known[:2] = False
    return known


def run(policy: Policy, series: Mapping[str, np.ndarray]) -> Run:
    """Put all series through a policy at once; each is some of the rows."""
    norms = np.concatenate(list(series.values()), axis=1)
    param_norms = np.full(norms.shape[1], 100, np.float32)
    state = policy.init(norms.shape[1])
    rows = []
    for step in norms:
        state, decision = decide(policy, state, step, param_norms=param_norms)
        rows.append((decision.threshold, decision.scale, decision.clipped))
    fields = [norms, *map(np.stack, zip(*rows, strict=True))]
    parts = [np.split(field, len(series), axis=1) for field in fields]
    return {name: Taken(*part) for name, *part in zip(series, *parts, strict=True)}


# The measures.


def clip_rate(taken: Taken, start: int = SETTLED) -> float:
    """Return the fraction of the norms that was clipped."""
    return float(taken.clipped[start:].mean())


def largest(taken: Taken) -> float:
    """Return the largest norm that was passed on."""
    return float((taken.scales * taken.norms)[SETTLED:].max())


def recovery(shifted: Taken, steady: Taken) -> int | None:
    """Return the steps from a rise until the mean scale is 90 % of that without it."""
    share = shifted.scales.mean(axis=1) / steady.scales.mean(axis=1)
    return first(share[SHIFT:] > 0.9)


def settling(shifted: Taken, steady: Taken, factor: float) -> int | None:
    """Return the steps from a fall until the threshold is 10 % above where it belongs.

    It belongs at `factor` times what it is without the fall.
    """
    ratio = shifted.thresholds[SHIFT:] / (factor * steady.thresholds[SHIFT:])
    return first(np.median(ratio, axis=1) < 1.1)


def first(good: np.ndarray) -> int | None:
    """Return the first place that is True."""
    return int(good.argmax()) if good.any() else None


# The table.


def make_table(runs: Mapping[str, Run]) -> str:
    """Return the table in Markdown, a row for each policy that ran."""
    rates = ["log-std 0.1", "log-std 0.3", "log-std 1.0"]
    heads = ["largest", "÷100 drift", "×10 drift", "×10", "÷10"]
    rows = [["policy", *rates, *heads]]
    for code, done in runs.items():
        steady, drifts = done["log-std 0.3"], (done["drift ÷100"], done["drift ×10"])
        row = [f"`{code}`" + (f", {POLICIES[code]}" if POLICIES[code] else "")]
        row += [number(clip_rate(done[kind])) for kind in rates]
        row += [f"{largest(done['spikes']):.1f}"]
        row += [number(clip_rate(drift, STEPS // 2)) for drift in drifts]
        row += [steps(recovery(done["shift ×10"], steady))]
        row += [steps(settling(done["shift ÷10"], steady, 0.1))]
        rows.append(row)
    return as_markdown(rows)


def number(rate: float) -> str:
    """Return a rate in percent with one digit after the point."""
    return f"{100 * rate:.1f}"


def steps(count: int | None) -> str:
    """Return a number of steps, or that they did not do."""
    return "never" if count is None else str(count)


def as_markdown(rows: list[list[str]]) -> str:
    """Return a table; the first row is its head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def policy_of(code: str) -> Policy:
    """Return the policy that an expression makes."""
    policy: Policy = eval(code, dict(vars(autoclip_core)))
    return policy


def put_between_marks(page: str, table: str) -> str:
    """Return the page with the table between its two marks."""
    marks = r"(<!-- table -->\n).*(\n<!-- end of table -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{table}\n{m[2]}", page, flags=re.DOTALL)


def main() -> None:
    """Print the table of all policies, or write that of some into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/controller.md")
    options = parser.parse_args()
    series = make_series()
    codes = SHOWN if options.write else tuple(POLICIES)
    table = make_table({code: run(policy_of(code), series) for code in codes})
    if options.write:
        text = put_between_marks(PAGE.read_text(encoding="utf-8"), table)
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(table)


if __name__ == "__main__":
    main()
