"""What a decision costs after 10^3, 10^5 and 10^6 steps, and with many rows.

Run it as `python benchmarks/growth.py`: it prints two tables in Markdown; it takes less
than a minute, and 3 GB. The norms are synthetic. No state is grown step by step:
it is put where so many norms would have brought it, and the steps from there are timed,
in the time of the processor: what else runs on the machine counts for little.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import autoclip_core
from autoclip_core import Policy, decide
from autoclip_core.history import RECENT, History
from autoclip_core.moments import Moments
from autoclip_core.window import Window

STEPS = (10**3, 10**5, 10**6)
ROWS = (1, 300, 10**4)
LENGTHS = (100, 10**3, 10**4)

OVER_TIME = (
    "Quantile(history_length=1000)",
    "Quantile(history_length=None)",
    "MeanStd(history_length=1000)",
    "MeanStd(history_length=None)",
    "ZScore()",
    "EmaRatio()",
    "StreamingQuantile()",
)
OVER_ROWS = (
    *(f"Quantile(history_length={length})" for length in LENGTHS),
    *(f"MeanStd(history_length={length})" for length in LENGTHS),
    "ZScore()",
    "EmaRatio()",
    "StreamingQuantile()",
)

Case = dict[str, Any]
"""A policy, its rows or steps, and the fields of its `Cost`."""


class Cost(NamedTuple):
    """What the steps from one state take."""

    microseconds: float
    """Of a step: the mean of the fastest round, which others disturbed least."""
    state_bytes: int
    """What the policy remembers."""


def measure() -> dict[str, list[Case]]:
    """Return what a step takes late in a run, and with many rows."""
    # With all norms, a merge falls into each round.
    over_time = [
        {"policy": code, "steps": steps}
        | time_steps(policy_of(code), steps, 1, RECENT, rounds=7)._asdict()
        for code in OVER_TIME
        for steps in STEPS
    ]
    longest = max(LENGTHS)
    over_rows = [
        {"policy": code, "rows": rows}
        | time_steps(policy_of(code), longest, rows, 1, max(3, 3000 // rows))._asdict()
        for code in OVER_ROWS
        for rows in ROWS
    ]
    return {"over_time": over_time, "over_rows": over_rows}


def time_steps(policy: Policy, steps: int, rows: int, each: int, rounds: int) -> Cost:
    """Time rounds of so many steps each, from where a number of steps leads a policy.

    All rows have the same norms: what a step does depends on none of them.
    """
    state = repeated(state_after(policy, draw(steps)), rows)
    size = bytes_of(state)
    coming = [norm.repeat(rows) for norm in draw(each)]
    state, _ = decide(policy, state, coming[0])
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for norms in coming:
            state, _ = decide(policy, state, norms)
        best = min(best, time.process_time() - start)
    return Cost(1e6 * best / each, size)


def draw(steps: int) -> np.ndarray:
    """Return log-normal norms."""
    rng = np.random.default_rng(steps)
    return np.exp(0.3 * rng.standard_normal(steps)).astype(np.float32)


def state_after(policy: Policy, norms: np.ndarray) -> Any:
    """Return the state of one row of a policy that has seen these norms."""
    state = policy.init(1)
    if isinstance(state, Window) and len(norms) >= state.ring.shape[1]:
        last = norms[-state.ring.shape[1] :]
        return Window(last[None], in_order(last), np.int32([len(last)]))
    if isinstance(state, History):
        return History(in_order(norms), state.recent, np.int32([len(norms)]))
    if isinstance(state, Moments):
        values = np.stack([norms, np.log(norms)], axis=1).astype(np.float64)
        squares = len(values) * values.var(axis=0)
        return Moments(values.mean(axis=0)[None], squares[None], np.int32([len(norms)]))
    for norm in norms[-2000:]:  # such a state has forgotten the older ones
        state, _ = decide(policy, state, norm[None])
    return state


def in_order(norms: np.ndarray) -> np.ndarray:
    """Return a row of norms as a window and a history keep it."""
    return np.concatenate([[-np.inf], np.sort(norms), [np.inf]]).astype("f4")[None]


def repeated(state: Any, rows: int) -> Any:
    """Return a state of one row for many rows."""
    return type(state)(*(leaf.repeat(rows, axis=0) for leaf in state))


def bytes_of(state: Any) -> int:
    """Return the size of a state."""
    return sum(leaf.nbytes for leaf in state)


def policy_of(code: str) -> Policy:
    """Return the policy that an expression makes."""
    policy: Policy = eval(code, dict(vars(autoclip_core)))
    return policy


# The tables.


def make_tables(found: dict[str, list[Case]]) -> str:
    """Return both tables in Markdown: a line per policy."""
    over_time = table(found["over_time"], "steps", STEPS, "step {:,}")
    over_rows = table(found["over_rows"], "rows", ROWS, "{:,} rows")
    return f"{over_time}\n\n{over_rows}"


def table(cases: list[Case], key: str, values: Sequence[int], head: str) -> str:
    """Return a table with a column per value, of time and memory."""
    heads = [head.format(value).replace(",", " ") for value in values]
    lines = [["one step · state", *heads], ["---"] * (1 + len(values))]
    for code in dict.fromkeys(case["policy"] for case in cases):
        own = {case[key]: case for case in cases if case["policy"] == code}
        lines.append([f"`{code}`", *(cell(own[value]) for value in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(case: Case) -> str:
    """Return time and memory with their units."""
    time_taken = scaled(case["microseconds"], 1000, ("µs", "ms", "s"))
    return f"{time_taken} · {scaled(case['state_bytes'], 1000, ('B', 'kB', 'MB'))}"


def scaled(number: float, factor: int, units: Sequence[str]) -> str:
    """Return a number in the unit in which it is short."""
    place = 0
    while number >= factor and place < len(units) - 1:
        number, place = number / factor, place + 1
    return f"{number:.3g} {units[place]}"


def main() -> None:
    """Print the tables, and save the numbers where asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write them there")
    options = parser.parse_args()
    found = measure()
    print(make_tables(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
