"""What a decision costs after 10^3, 10^5 and 10^6 steps, and with many rows.

Run it as `python benchmarks/growth.py`: it prints three tables in Markdown; it takes
about a minute, and 3 GB. The norms are synthetic. No state is grown step by step:
it is put where so many norms would have brought it, and the steps from there are timed,
in the time of the processor: what else runs on the machine counts for little. Where all
norms are kept, one step in 1024 merges them; that one is timed apart, and its share in
each step added.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

import autoclip_core
import command
from autoclip_core import Policy, decide
from autoclip_core.history import RECENT, History
from autoclip_core.moments import Moments
from autoclip_core.window import Window

STEPS = (10**3, 10**5, 10**6)
ROWS = (1, 300, 10**4)
LENGTHS = (100, 10**3, 10**4)
MOST_BYTES = 2**30
"""What a window may take; a history that grows is compared with it."""

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
    *(f"Quantile(history_length={length})" for length in (*LENGTHS, None)),
    *(f"MeanStd(history_length={length})" for length in (*LENGTHS, None)),
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
    merge_milliseconds: float
    """Of the one step in 1024 that merges all norms; its share is in the others."""
    state_bytes: int
    """What the policy remembers."""


def measure(steps: Sequence[int], rows: Sequence[int]) -> dict[str, list[Case]]:
    """Return what a step takes late in a run, and with many rows."""
    over_time = [
        {"policy": code, "steps": seen} | time_steps(code, seen, 1)._asdict()
        for code in OVER_TIME
        for seen in steps
    ]
    longest = max(LENGTHS)
    over_rows = [
        {"policy": code, "rows": many} | time_steps(code, longest, many)._asdict()
        for code in OVER_ROWS
        for many in rows
    ]
    return {"over_time": over_time, "over_rows": over_rows}


def time_steps(code: str, steps: int, rows: int) -> Cost:
    """Time steps from where a number of them leads a policy.

    All rows have the same norms: what a step does depends on none of them.
    """
    policy = policy_of(code)
    state = repeated(state_after(policy, draw(steps)), rows)
    size, rounds = bytes_of(state), max(3, 3000 // rows)
    coming = [norm.repeat(rows) for norm in draw(min(rounds, RECENT // 2))]
    merge = time_once(policy, about_to_merge(state), coming[0])
    start, before, best = state, time.process_time(), float("inf")
    for step in range(rounds):
        if step % len(coming) == 0:
            state = start  # a history has room for these, and merges in none of them
        before = time.process_time()
        state, _ = decide(policy, state, coming[step % len(coming)])
        best = min(best, time.process_time() - before)
    return Cost(1e6 * (best + merge / RECENT), 1e3 * merge, size)


def about_to_merge(state: Any) -> Any:
    """Return a state whose next step merges all norms, or None."""
    if not isinstance(state, History):
        return None
    rows, more = len(state.count), RECENT - 1
    recent = np.append(in_order(draw(more))[:, :-1], np.full((1, 2), np.inf, "f4"), 1)
    return History(state.settled, recent.repeat(rows, axis=0), state.count + more)


def time_once(policy: Policy, state: Any, norms: np.ndarray) -> float:
    """Return the seconds of one step from a state, the least of three; 0 for None."""
    if state is None:
        return 0.0
    taken = []
    for _ in range(3):
        before = time.process_time()
        decide(policy, state, norms)
        taken.append(time.process_time() - before)
    return min(taken)


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
    """Return three tables in Markdown: late in a run, with many rows, what grows."""
    over_time = table(found["over_time"], "steps", "step {:,}")
    over_rows = table(found["over_rows"], "rows", "{:,} rows")
    return f"{over_time}\n\n{over_rows}\n\n{table_of_growth(found['over_rows'])}"


def table_of_growth(cases: list[Case]) -> str:
    """Return what a history of all norms takes, by rows."""
    lines = [["rows", "bytes a step", "1 GiB after", "one step in 1024"], ["---"] * 4]
    for case in cases:
        if case["policy"] == "Quantile(history_length=None)":
            rows, merge = case["rows"], 1e3 * case["merge_milliseconds"]
            most = MOST_BYTES // (4 * rows)
            took = scaled(merge, 1000, ("µs", "ms", "s"))
            cells = f"{rows:,}", f"{4 * rows:,}", f"{most:,} steps", took
            lines.append([cell.replace(",", " ") for cell in cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(cases: list[Case], key: str, head: str) -> str:
    """Return a table with a column per value, of time and memory."""
    values = sorted({case[key] for case in cases})
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
    options = command.parse(command.parser(__doc__))
    found = measure(*((STEPS[:1], ROWS[:1]) if options.quick else (STEPS, ROWS)))
    print(make_tables(found))
    command.save(options.json, **found)


if __name__ == "__main__":
    main()
