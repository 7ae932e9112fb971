"""What is printed and saved: a table per model, and all numbers as JSON."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

import autoclip_torch
from contenders import REFERENCE, Contender
from timing import Result

LEGEND = f"""\
ms: median of one step, gradients and history restored before each, outside the timing
ratio: to torch.nn.utils.{REFERENCE} in the same round; median (quartiles)
best: the fastest step to its fastest step; on a busy machine, look here
rows: norms that are told apart; every window holds 1000 steps and is full
"the same again" is the reference a second time: what it is off 1 is noise\
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
    for contender in contenders:
        cells = "".join(_cells(contender.name, case) for case in cases)
        lines.append(f"{contender.name:24}{contender.rows:7}{cells}")
    return "\n".join(lines)


def save(path: Path, cases: Sequence[Case], threads: int) -> None:
    """Write every number as JSON."""
    about: dict[str, Any] = {
        "reference": REFERENCE,
        "threads": threads,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "autoclip_torch": autoclip_torch.__version__,
    }
    about["results"] = [
        {
            **{name: getattr(case, name) for name in ("model", "parameters")},
            **{name: getattr(case, name) for name in ("tensors", "regime")},
            "contender": contender,
            "rounds": result.rounds,
            "milliseconds": result.milliseconds._asdict(),
            "ratio": result.ratio._asdict(),
            "fastest_milliseconds": result.fastest,
        }
        for case in cases
        for contender, result in case.results.items()
    ]
    path.write_text(json.dumps(about, indent=1) + "\n")


def _rounds(case: Case) -> int:
    return next(iter(case.results.values())).rounds


def _cells(name: str, case: Case) -> str:
    result, ratio = case.results[name], case.results[name].ratio
    quartiles = f"({ratio.low:.2f}–{ratio.high:.2f})"
    best = result.fastest / case.results[REFERENCE].fastest
    median = result.milliseconds.median
    return f"{median:8.2f}{ratio.median:7.2f}{quartiles:>14}{best:6.2f}"
