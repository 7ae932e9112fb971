"""Measure what each policy does to series of norms whose answer is known.

Run it as `python benchmarks/controller.py`: it prints the tables of
docs/evidence/controller.md; with `--write` it puts them there, and the short one into
docs/controller.md. No network is trained, everything is drawn from one
seed, and all series are rows of one run per policy. It takes under a minute.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import autoclip_core
from autoclip_core import Policy, decide

PAGE = Path(__file__).parents[1] / "docs" / "evidence" / "controller.md"
"""The page that holds all tables."""
SHORT_PAGE = PAGE.parents[1] / PAGE.name
"""The page that holds the table of `SHOWN`."""

STEPS, ROWS = 4000, 8
SETTLED = 1000
"""Steps until the longest window is full; what comes before is not counted."""
SHIFT = 1500
"""The step of the change of level."""
LOG_STDS = (0.1, 0.3, 0.5, 1.0)
OCTAVES = 13

POLICIES = {
    "Fixed(1.0)": "at the mean norm",
    "Fixed(5.0)": "at five times the mean",
    "ParamRatio(0.01)": "AGC; the parameters' norm is 100",
    "Quantile(0.9)": "the default",
    "Quantile(0.5)": "the median",
    "Quantile(0.95, history_length=128)": "a short window",
    "Quantile(0.1, history_length=None, include_current=True)": "AutoClip's paper",
    "Quantile(0.05, history_length=100, include_current=True)": "bitsandbytes' 5",
    "StreamingQuantile(0.9)": "",
    "StreamingQuantile(0.5)": "",
    "MeanStd()": "two deviations",
    "MeanStd(2.0, log=True, history_length=200)": "of the logarithms",
    "MeanStd(4.0, log=True, history_length=200)": "a spike filter",
    "ZScore()": "",
    "ZScore(target='threshold')": "",
    "ZScore(record='applied')": "ZClip's paper",
    "ZScore(target='mean', record='applied')": "ZClip's paper, to the mean",
    "EmaRatio()": "AdaGC's paper",
    "EmaRatio(2.0)": "",
    "Drop(MeanStd(6.0, history_length=128))": "drops",
    "Warmup(StreamingQuantile(0.9), steps=100, threshold=1.0)": "",
    "Cap(StreamingQuantile(0.9), max_norm=1.0)": "",
    "Floor(StreamingQuantile(0.9), min_norm=1.0)": "",
}
"""The policies, as expressions in the names of `autoclip_core`, and what they are."""

SHOWN = (
    "Fixed(1.0)",
    "Quantile(0.9)",
    "Quantile(0.5)",
    "StreamingQuantile(0.9)",
    "MeanStd()",
    "ZScore()",
    "ZScore(record='applied')",
    "EmaRatio()",
    "EmaRatio(2.0)",
)
"""The policies of the short table."""


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


def mean_scale(taken: Taken) -> float:
    """Return the mean of the applied scale."""
    return float(taken.scales[SETTLED:].mean(dtype=np.float64))


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


def change(scaled: Taken, steady: Taken) -> float:
    """Return by how much a constant factor of the loss changes a scale, at most."""
    return float(np.max(abs(np.float64(scaled.scales) - steady.scales)))


def records_gaps(gaps: Taken, steady: Taken) -> bool:
    """Return whether a threshold differs from that of the finite norms alone."""
    known = gaps.thresholds[known_steps()]
    return not np.array_equal(known, steady.thresholds[: len(known)])


# The tables.


def make_tables(runs: Mapping[str, Run]) -> str:
    """Return both tables in Markdown, from what each policy of `POLICIES` did."""
    kinds = [f"log-std {s}" for s in LOG_STDS] + ["spikes"]
    steady = [["policy", "", "expected", *kinds]]
    heads = ["÷100 drift", "×10 drift", "×10", "÷10", "loss ×2^k", "NaN, Inf"]
    changing = [["policy", *heads]]
    for code, done in runs.items():
        cells = [calm_cell(done[kind]) for kind in kinds]
        rate = policy_of(code).expected_clip_rate
        expected = "–" if rate is None else percent(rate)
        steady.append([f"`{code}`", POLICIES[code], expected, *cells])
        changing.append([f"`{code}`", *change_cells(done)])
    return as_markdown(steady) + "\n\n" + as_markdown(changing)


def make_short_table(runs: Mapping[str, Run]) -> str:
    """Return clip rates at three spreads, and steps to follow a change, in Markdown."""
    kinds = ["log-std 0.1", "log-std 0.3", "log-std 1.0"]
    rows = [["policy", *kinds, "×10", "÷10"]]
    for code in SHOWN:
        rates = [percent(clip_rate(runs[code][kind])) for kind in kinds]
        rows.append([f"`{code}`", *rates, *change_cells(runs[code])[2:4]])
    return as_markdown(rows)


def calm_cell(taken: Taken) -> str:
    """Return clip rate, mean scale and largest norm passed."""
    rate = percent(clip_rate(taken))
    return f"{rate} · {mean_scale(taken):.2f} · {largest(taken):.1f}"


def change_cells(done: Run) -> list[str]:
    """Return how a policy follows what changes."""
    steady = done["log-std 0.3"]
    changed = max(change(done[name], steady) for name in ("loss ×2^k", "loss ÷2^k"))
    exact = "to rounding" if changed < 1e-4 else "changes"
    return [
        *(
            percent(clip_rate(done[f"drift {by}"], STEPS // 2))
            for by in ("÷100", "×10")
        ),
        steps(recovery(done["shift ×10"], steady)),
        steps(settling(done["shift ÷10"], steady, 0.1)),
        exact if changed else "exact",
        "learned" if records_gaps(done["NaN, Inf"], steady) else "ignored",
    ]


def percent(rate: float) -> str:
    """Return a rate with one digit after the point."""
    return f"{100 * rate:.1f} %"


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


def put_between_marks(page: str, tables: str) -> str:
    """Return the page with the tables between its two marks."""
    marks = r"(<!-- tables -->\n).*(\n<!-- end of tables -->)"
    return re.sub(marks, lambda m: f"{m[1]}\n{tables}\n{m[2]}", page, flags=re.DOTALL)


def main() -> None:
    """Print the tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into the two pages")
    options = parser.parse_args()
    series = make_series()
    runs = {code: run(policy_of(code), series) for code in POLICIES}
    for page, tables in (
        (PAGE, make_tables(runs)),
        (SHORT_PAGE, make_short_table(runs)),
    ):
        if options.write:
            text = put_between_marks(page.read_text(encoding="utf-8"), tables)
            page.write_text(text, encoding="utf-8")
        else:
            print(tables, end="\n\n")


if __name__ == "__main__":
    main()
