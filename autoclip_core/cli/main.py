"""The command line: replay a series of norms, suggest a threshold, report on a run."""

import argparse
import csv
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autoclip_core import __version__
from autoclip_core.files.read import Series, read_series, read_table, table_to_series
from autoclip_core.log.clip_log import ClipLog
from autoclip_core.log.csv_jsonl import find_run_line, table_to_steps, write_csv
from autoclip_core.log.report import write_report
from autoclip_core.planning.plot import draw_comparison, draw_replay, replay_to_steps
from autoclip_core.planning.replay import Replay, as_series, replay
from autoclip_core.planning.suggest import suggest_threshold
from autoclip_core.policies.quantile import Quantile
from autoclip_core.policy import as_code

from .policy_options import add_options, make_policies, make_policy, refuse_options
from .progress import progress_bar

BAD_INPUT = (OSError, ValueError, TypeError, EOFError, ImportError, csv.Error)
"""What a wrong file or option raises; any other exception is a bug."""

LAYOUT: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
"""How a parser prints its help: descriptions and examples are not wrapped again."""

EXAMPLES = """examples:
  autoclip suggest norms.csv
  autoclip replay norms.csv --column grad_norm --quantile 0.9 --plot out.png
  autoclip replay norms.csv --compare --plot policies.png
  autoclip report run.jsonl -o report.html

FILE is CSV, JSON lines or .npy; "-" is stdin. Without --column, the norms are in the
only column except step, epoch and time, or else in the only column whose name contains
"norm". NaN and infinity are non-finite steps; empty cells are skipped.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 2 for bad input.

    >>> main(["suggest", "no such file.csv"])  # prints one line to stderr
    2
    """
    prefix = ""
    try:
        options = make_parser().parse_args(argv)
        if "policy" in options:
            options.policy = make_policy(options)
        prefix = f"{options.file}: "
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader closed the pipe: discard the output that is still buffered.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    except BAD_INPUT as error:
        if isinstance(error, OSError) and error.filename:
            prefix = f"{error.filename}: "  # it may be an output file
        print(f"autoclip: {prefix}{one_line(error)}", file=sys.stderr)
        return 2
    return 0


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line."""
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error) or type(error).__name__).split())


class Parser(argparse.ArgumentParser):
    """A parser that prints an error on one line."""

    def error(self, message: str) -> NoReturn:
        """Print the error and the help command, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the three commands."""
    parser = Parser(prog="autoclip", description=__doc__, epilog=EXAMPLES, **LAYOUT)
    version = f"%(prog)s {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "apply a policy, or all policies, to a logged series of norms"
    command = add_command(commands, "replay", run_replay, about)
    add_until(command)
    about = "compare all policies in a table"
    command.add_argument("--compare", action="store_true", help=about)
    command.add_argument("--plot", metavar="PICTURE", help="where to save a picture")
    about = "where to save the threshold and scale of each step"
    command.add_argument("--output", metavar="CSV", help=about)
    command.add_argument("--json", action="store_true", help="print JSON")
    add_options(command)

    about = "print statistics of the norms and a suggested threshold with reasons"
    command = add_command(commands, "suggest", run_suggest, about)
    add_until(command)
    command.add_argument("--json", action="store_true", help="print JSON")

    about = "write one HTML page about a run, from the file that ClipLog.to_jsonl wrote"
    command = add_command(commands, "report", run_report, about)
    about = "the page (default: %(default)s)"
    command.add_argument("-o", "--output", default="report.html", help=about)
    command.add_argument("--title", default="Gradient clipping report")
    return parser


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], about: str
) -> argparse.ArgumentParser:
    """Add a command with the arguments FILE and --column."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=about, description=about, **LAYOUT
    )
    command.set_defaults(run=run)
    command.add_argument("file", metavar="FILE", help='CSV, JSON lines, .npy or "-"')
    command.add_argument("--column", metavar="NAME", help="the column of the norms")
    return command


def add_until(command: argparse.ArgumentParser) -> None:
    """Add the option --until."""
    about = "read only the first N steps, such as those before a run diverged"
    command.add_argument("--until", metavar="N", type=parse_count, help=about)


def parse_count(text: str) -> int:
    """Return a number of steps, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return int(text)


def read_steps(options: argparse.Namespace) -> Series:
    """Return the norms that the options select."""
    series = read_series(options.file, options.column)
    return series._replace(norms=series.norms[: options.until])


def run_replay(options: argparse.Namespace) -> None:
    """Replay one policy, or compare all policies."""
    if options.compare:
        return run_compare(options)
    series = read_steps(options)
    bar = progress_bar("replay")
    report = replay(as_series(series.norms), options.policy, progress=bar)
    if options.plot:
        draw_replay(report, options.plot)
    if options.output:
        write_csv(options.output, replay_to_steps(report))
    if options.json:
        print_json({"column": series.column, **report_to_dict(report)})
    else:
        print(f"column            {series.column}\n{report}")
    return None


def run_compare(options: argparse.Namespace) -> None:
    """Replay every policy and print a table."""
    if options.output:
        raise ValueError("--output saves the steps of one policy; leave out --compare")
    refuse_options(options)
    series = read_steps(options)
    norms = as_series(series.norms)
    reports = {
        name: replay(norms, policy, progress=progress_bar(name))
        for name, policy in make_policies(norms).items()
    }
    if options.plot:
        draw_comparison(reports, options.plot)
    if options.json:
        rows = [{"name": name, **report_to_dict(r)} for name, r in reports.items()]
        print_json({"column": series.column, "policies": rows})
    else:
        print(format_table(series, reports))


def format_table(series: Series, reports: dict[str, Replay]) -> str:
    """Return the comparison as an aligned table."""
    first = next(iter(reports.values()))
    header = ["policy", "clip rate", "median threshold", "mean scale", "spikes caught"]
    header += ["recovered after"] if first.shift else []
    rows = [header]
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
    lines.insert(1, "  ".join("-" * width for width in widths))
    steps = f"{len(first.norms)} steps ({first.nonfinite} non-finite)"
    title = f"column {series.column}: {steps}"
    if first.shift:
        title += f", level x{first.shift.ratio:.3g} at step {first.shift.step}"
    return "\n".join([title, "", *lines])


def run_suggest(options: argparse.Namespace) -> None:
    """Print statistics and a suggested threshold."""
    series = read_steps(options)
    suggestion = suggest_threshold(series.norms)
    if options.json:
        fields = {**vars(suggestion), "policy": as_code(suggestion.policy)}
        print_json({"column": series.column, **fields})
    else:
        print(f"column        {series.column}\n{suggestion}")


def run_report(options: argparse.Namespace) -> None:
    """Write the HTML page."""
    write_report(read_log(options), options.output, options.title)
    print(f"{options.output}: {Path(options.output).stat().st_size // 1000} kB")


def read_log(options: argparse.Namespace) -> ClipLog:
    """Return the log in a file; a series of norms is replayed with the default policy.

    The page needs thresholds, and its settings name the policy that set them.
    """
    table, other_lines = read_table(options.file)
    names = {name.removeprefix("clip/") for name in table}
    if options.column is None and {"norm", "threshold"} <= names:
        return ClipLog.from_steps(
            table_to_steps(table, options.file), find_run_line(other_lines)
        )
    policy = Quantile(0.9)
    series = table_to_series(table, options.column)
    report = replay(as_series(series.norms), policy, progress=progress_bar("replay"))
    source = f"column {series.column} of {options.file}"
    settings = {"policy": str(policy), "norms": source}
    return ClipLog.from_steps(replay_to_steps(report), {"settings": settings})


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
