"""What is printed and saved: a table per model, and all numbers as plain Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from contenders import REFERENCE, SAME, Contender
from timing import Result

LEGEND = f"""\
ms: median of one step, gradients and history restored before each, outside the timing
ratio: to torch.nn.utils.{REFERENCE} in the same round; median (quartiles)
*: the least ratio of those that clip
best: the fastest step to its fastest step; on a busy machine, look here
rows: norms that are told apart; every window holds 1000 steps and is full
"{SAME}" is the reference a second time: what it is off 1 is noise\
"""


@dataclass(frozen=True)
class Case:
    """All contenders on one model, in one regime."""

    model: str
    parameters: int
    tensors: int
    regime: str
    results: Mapping[str, Result]


def make_table(cases: Sequence[Case], contenders: Sequence[Contender]) -> str:
    """Return the table of one model: a line per contender, its regimes side by side."""
    first = cases[0]
    millions = f"{first.parameters / 1e6:.1f}M parameters"
    title = f"{first.model}: {millions} in {first.tensors} tensors, "
    title += ", ".join(f"{_rounds(case)} rounds {case.regime}" for case in cases)
    regimes = "".join(f"{case.regime:>35}" for case in cases)
    columns = f"{'ms':>8}{'ratio':>7}{'(quartiles)':>14}{'best':>6}" * len(cases)
    lines = [title, f"{'':31}{regimes}".rstrip(), f"{'':24}{'rows':>7}{columns}"]
    names = _compared(contenders)
    least = [min(case.results[name].ratio.median for name in names) for case in cases]
    for contender in contenders:
        pairs = zip(cases, least, strict=True)
        cells = "".join(_cells(contender.name, *pair) for pair in pairs)
        lines.append(f"{contender.name:24}{contender.rows:7}{cells}")
    return "\n".join(lines)


def to_plain(
    cases: Sequence[Case], contenders: Sequence[Contender]
) -> list[dict[str, Any]]:
    """Return every number, one dictionary per contender and case."""
    compared = _compared(contenders)
    return [
        {
            **{name: getattr(case, name) for name in ("model", "parameters")},
            **{name: getattr(case, name) for name in ("tensors", "regime")},
            "contender": contender,
            "clips": contender in compared,
            "rounds": result.rounds,
            "milliseconds": result.milliseconds._asdict(),
            "ratio": result.ratio._asdict(),
            "fastest_milliseconds": result.fastest,
        }
        for case in cases
        for contender, result in case.results.items()
    ]


def _rounds(case: Case) -> int:
    return next(iter(case.results.values())).rounds


def _compared(contenders: Sequence[Contender]) -> list[str]:
    """Return the names of those that clip, without the reference."""
    return [c.name for c in contenders if c.clips and c.name not in (REFERENCE, SAME)]


def _cells(name: str, case: Case, least: float) -> str:
    result, ratio = case.results[name], case.results[name].ratio
    quartiles = f"({ratio.low:.2f}–{ratio.high:.2f})"
    best = result.fastest / case.results[REFERENCE].fastest
    median, star = result.milliseconds.median, "*" if ratio.median == least else " "
    return f"{median:8.2f}{ratio.median:7.2f}{star}{quartiles:>13}{best:6.2f}"
