"""What a decision costs after 10^3, 10^5 and 10^6 steps, and with many rows.

Run it as `python benchmarks/growth.py`; it takes some minutes, and 6 GB. The norms are
drawn. A policy is run over them, in one row; many rows are copies of it. A
bounded history is run over the last norms only. Times are those of the processor, so
other load on the machine counts for little.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import autoclip_core
import command
from autoclip_core import Policy, decide
from timing import spread

STEPS = (10**3, 10**5, 10**6)
ROWS = (1, 300, 10**4)
NORMS = (10**3, 10**4, 10**5, 10**6)
LENGTHS = (10**3, None)
POLICIES = (
    *(f"Quantile(history_length={length})" for length in LENGTHS),
    *(f"MeanStd(history_length={length})" for length in LENGTHS),
    "ZScore()",
    "EmaRatio()",
    "StreamingQuantile()",
)
MOST_BYTES = 2 * 10**9
"""A larger state is not built; only its size is reported."""
LAST_NORMS = 10**4
"""The norms of a run that matter: older ones are in no window and in no average."""
LEAST_REPEATS, MOST_REPEATS, SECONDS = 5, 2000, 0.2

Line = dict[str, Any]


def main() -> None:
    """Measure each policy late in a run, with few rows and with many."""
    options = command.parse(command.parser(__doc__))
    steps, rows = (STEPS[:1], ROWS[:1]) if options.quick else (STEPS, ROWS)
    lines = [line for code in POLICIES for line in late(code, steps, rows)]
    every = all_norms(NORMS[:1] if options.quick else NORMS)
    command.finish(options, "growth", steps=lines, all_norms=every)


def late(code: str, steps: Sequence[int], rows: Sequence[int]) -> list[Line]:
    """Return what a step takes after so many steps, in so many rows."""
    policy, lines = policy_of(code), []
    for count in steps:
        state, _ = run(policy, policy.init(1), norms_until(policy, count))
        for many in rows:
            line = {"policy": code, "rows": many, "steps": count}
            size = many * bytes_of(state)
            fits = size <= MOST_BYTES
            took = time_steps(policy, repeated(state, many)) if fits else None
            lines.append(line | {"median": took, "state_bytes": size})
    return sorted(lines, key=lambda line: line["rows"])


def all_norms(wanted: Sequence[int]) -> list[Line]:
    """Return what a history of all norms costs; merges are in the mean."""
    policy = policy_of("Quantile(history_length=None)")
    state, count, lines = policy.init(1), 0, []
    for norms in wanted:
        state, taken = run(policy, state, draw(norms - count))
        count = norms
        line = {"norms": norms, "median": time_steps(policy, state)}
        line |= {"mean": float(taken.mean()), "longest": float(taken.max())}
        lines.append(line | {"state_bytes": bytes_of(state)})
    return lines


def run(policy: Policy, state: Any, norms: np.ndarray) -> tuple[Any, np.ndarray]:
    """Return the state after these norms, and the seconds to record each."""
    limit, times = policy.limit(state), np.empty(1 + len(norms))
    times[0] = time.process_time()
    for step, norm in enumerate(norms, 1):
        state = policy.record(state, norm, limit)
        times[step] = time.process_time()
    return state, np.diff(times)


def time_steps(policy: Policy, state: Any) -> float:
    """Return the median of the seconds of one step, from this state on."""
    rows, taken = len(state[0]), []
    for norm in draw(MOST_REPEATS):
        norms, start = norm.repeat(rows), time.process_time()
        state, _ = decide(policy, state, norms)
        taken.append(time.process_time() - start)
        if len(taken) >= LEAST_REPEATS and sum(taken) > SECONDS:
            break
    return spread(taken).median


def norms_until(policy: Policy, steps: int) -> np.ndarray:
    """Return the norms of the first `steps` steps that still influence the state."""
    is_bounded = getattr(policy, "history_length", LAST_NORMS) is not None
    return draw(steps)[-LAST_NORMS if is_bounded else 0 :]


def draw(steps: int) -> np.ndarray:
    """Return log-normal norms, shape (steps, 1)."""
    rng = np.random.default_rng(steps)
    return np.exp(0.3 * rng.standard_normal((steps, 1))).astype(np.float32)


def repeated(state: Any, rows: int) -> Any:
    """Return a state of one row for many rows, which all had the same norms."""
    return type(state)(*(leaf.repeat(rows, axis=0) for leaf in state))


def bytes_of(state: Any) -> int:
    """Return the size of a state."""
    return sum(leaf.nbytes for leaf in state)


def policy_of(code: str) -> Policy:
    """Return the policy that an expression makes."""
    policy: Policy = eval(code, dict(vars(autoclip_core)))
    return policy


if __name__ == "__main__":
    main()
