"""How results are printed: text and tables of at most 80 columns, or JSON."""

import json
import math
from typing import Any

from autoclip_core.log.formatting import wrap_text
from autoclip_core.planning.replay import Replay
from autoclip_core.policy import as_code


def print_text(*paragraphs: object) -> None:
    """Print text in lines of at most 80 columns, without escape sequences."""
    print(wrap_text("\n".join(map(str, paragraphs))))


def format_table(reports: dict[str, Replay]) -> str:
    """Return the comparison as an aligned table."""
    first = next(iter(reports.values()))
    rows = [
        [
            "",
            "clip",
            "median",
            "mean",
            "spikes",
            *(["recovered"] if first.shift else []),
        ],
        ["policy", "rate", "threshold", "scale", "caught"],
    ]
    rows[1] += ["after"] if first.shift else []
    for name, report in reports.items():
        spikes = f"{len(report.spikes_caught)}/{len(report.spikes)}"
        row = [name, f"{100 * report.clip_rate:.3g} %"]
        row += [f"{report.median_threshold:.4g}", f"{report.mean_scale:.3g}", spikes]
        if first.shift:
            is_never = math.isinf(report.recovery)
            row.append("never" if is_never else f"{report.recovery:.0f}")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(2, "  ".join("-" * width for width in widths))
    if first.shift:
        lines.insert(0, f"level x{first.shift.ratio:.3g} at step {first.shift.step}")
    return "\n".join(["", *lines])


def report_to_dict(report: Replay) -> dict[str, Any]:
    """Return the numbers of a replay for JSON."""
    shift = report.shift
    return {
        "policy": as_code(report.policy),
        "steps": len(report.norms),
        "nonfinite": report.nonfinite,
        "clip_rate": report.clip_rate,
        "clip_rate_over_time": report.rates().tolist(),
        "mean_scale": report.mean_scale,
        "median_threshold": report.median_threshold,
        "spikes": report.spikes.tolist(),
        "spikes_caught": report.spikes_caught.tolist(),
        "shift": shift._asdict() if shift else None,
        "recovery": report.recovery,
    }


def print_json(value: Any) -> None:
    """Print JSON with null for NaN and infinity, which JSON does not have."""
    print(json.dumps(replace_nonfinite(value), indent=2))


def replace_nonfinite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: replace_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    is_nonfinite = isinstance(value, float) and not math.isfinite(value)
    return None if is_nonfinite else value
