"""How results are printed: text and tables of at most 80 columns, or JSON."""

import errno
import json
import math
import os
import sys
from typing import Any

from autoclip_core.files.names import make_printable
from autoclip_core.files.read import LoggedNorms
from autoclip_core.log.formatting import format_number, format_percent, wrap_text
from autoclip_core.planning.replay import Replay
from autoclip_core.planning.suggest import Suggestion
from autoclip_core.policy import as_code

from .rich_output import has_rich, print_table


def print_text(*paragraphs: object) -> None:
    """Print text in lines of at most 80 columns, without escape sequences."""
    write_stdout(wrap_text("\n".join(map(str, paragraphs))))


def print_error(text: str) -> None:
    """Print an error to stderr: on one line, or wrapped if stderr is a terminal."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    print(wrap_text(text) if is_terminal else make_printable(text), file=sys.stderr)


def write_stdout(text: str) -> None:
    """Write lines to stdout at once; an error names stdout."""
    if sys.stdout is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdout")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_stdout()  # Python would try again at the end
        raise type(error)(error.errno, error.strerror, "stdout") from None


def discard_stdout() -> None:
    """Discard the output that is still buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_comparison(read: LoggedNorms, reports: dict[str, Replay]) -> None:
    """Print a table with a line per policy; rich colours it on a terminal."""
    shift = next(iter(reports.values())).shift
    text = f"level x{shift.ratio:.3g} at step {shift.step}" if shift else ""
    header = ["policy", "clip\nrate", "median\nthreshold", "mean\nscale"]
    has_risen = shift is not None and shift.ratio > 1
    header += ["spikes\ncaught", *(["follows\nafter"] if has_risen else [])]
    rows = [[name, *format_cells(report)] for name, report in reports.items()]
    if sys.stdout.isatty() and has_rich():
        print_text(read, *([text] if text else []))
        print_table(header, rows)
    else:
        print_text(read, text, format_table(header, rows))


def format_cells(report: Replay) -> list[str]:
    """Return the cells of a policy, without its name."""
    spikes = report.describe_spikes().replace(" of ", "/")
    cells = [format_percent(report.clip_rate), f"{report.median_threshold:.4g}"]
    cells += [format_number(report.mean_scale, 3), spikes]
    if not math.isnan(report.recovery):
        is_never = math.isinf(report.recovery)
        cells.append("never" if is_never else f"{report.recovery:.0f}")
    return cells


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Return an aligned table; a name in the header may have two lines.

    >>> print(format_table(["policy", "clip\\nrate"], [["fixed 2", "10 %"]]))
             clip
    policy   rate
    -------  ----
    fixed 2  10 %
    """
    names = [name.rpartition("\n") for name in header]
    rows = [[name[0] for name in names], [name[2] for name in names], *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


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


def suggestion_to_dict(suggestion: Suggestion) -> dict[str, Any]:
    """Return a suggestion for JSON, the diagnosis first."""
    diagnosis, policy = suggestion.diagnosis, suggestion.policy
    fields = {k: v for k, v in vars(suggestion).items() if k != "diagnosis"}
    return {
        "verdict": diagnosis.verdict,
        "sentence": diagnosis.sentence,
        "step": diagnosis.step,
        "spikes": diagnosis.spikes,
        **fields,
        "policy": as_code(policy) if policy else None,
        "diverged_at": suggestion.diverged_at,
    }


def print_json(value: Any) -> None:
    """Print JSON with null for NaN and infinity, which JSON does not have."""
    write_stdout(json.dumps(replace_nonfinite(value), indent=2))


def replace_nonfinite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinity."""
    if isinstance(value, dict):
        return {name: replace_nonfinite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_nonfinite(item) for item in value]
    is_nonfinite = isinstance(value, float) and not math.isfinite(value)
    return None if is_nonfinite else value
