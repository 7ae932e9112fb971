"""The command line: replay norms, suggest a threshold, report on a run."""

import argparse
import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from autoclip_core import __version__
from autoclip_core.files.folders import find_in_folder
from autoclip_core.files.open_file import stdin_as_file

from .commands import run_compare, run_replay, run_report, run_suggest
from .output import discard_stdout, print_error
from .policy_options import add_options, make_policy

BAD_INPUT = (OSError, ValueError, TypeError, EOFError, ImportError, csv.Error)
"""What a wrong file or option raises; any other exception is a bug."""

LAYOUT: Any = {"formatter_class": argparse.RawDescriptionHelpFormatter}
"""How a parser prints its help: descriptions and examples are not wrapped again."""

EXAMPLES = """examples:
  autoclip suggest norms.csv
  autoclip replay norms.csv --column grad_norm --quantile 0.9 --plot out.png
  autoclip replay norms.csv --compare --plot policies.png
  autoclip report run.jsonl -o report.html

FILE is what a run left: a CSV, JSON lines, trainer_state.json, a log of what
was printed, TensorBoard events, an MLflow metric, .npy, .npz, or the folder of
a run. It may be compressed as .gz. "-" is stdin. Without --column, the norms
are in the column that is named as the norm of the whole gradient. NaN and
infinity are non-finite steps. Empty cells are left out.
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
        refuse_overwriting(options)
        with stdin_as_file(options.file) as options.path:
            options.run(options)
    except BrokenPipeError:
        discard_stdout()  # the reader closed the pipe
    except KeyboardInterrupt:
        return 130
    except BAD_INPUT as error:
        if isinstance(error, OSError) and error.filename:
            prefix = f"{error.filename}: "  # it may be an output file
        print_error(f"autoclip: {prefix}{join_lines(error)}")
        return 2
    return 0


def refuse_overwriting(options: argparse.Namespace) -> None:
    """Check that no output replaces a file that is read."""
    for name in ("output", "plot"):
        path = getattr(options, name, None)
        if not path or path == "-" or not Path(path).exists():
            continue
        inputs = map(os.stat, list_inputs(options.file, options.column))
        if any(os.path.samestat(os.stat(path), each) for each in inputs):
            raise ValueError(
                f"--{name} must be another file than the one that is read, got {path}"
            )


def list_inputs(path: str, column: str | None) -> list[Path | int]:
    """Return the files that a command reads, or the number of the open one."""
    if path == "-":
        return [0]  # stdin may be a file
    is_folder = Path(path).is_dir()
    return [*find_in_folder(Path(path), column)] if is_folder else [Path(path)]


def join_lines(error: BaseException) -> str:
    """Return the text of an error on one line."""
    text = error.strerror if isinstance(error, OSError) else None
    return " ".join((text or str(error) or type(error).__name__).split())


class Parser(argparse.ArgumentParser):
    """A parser that prints an error as the commands do."""

    def error(self, message: str) -> NoReturn:
        """Print the error and the help command, and exit with status 2."""
        print_error(f"{self.prog}: {message}; see {self.prog} --help")
        self.exit(2)


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
    command.add_argument(
        "--compare", action="store_const", dest="run", const=run_compare, help=about
    )
    command.add_argument("--plot", metavar="PICTURE", help="where to save a picture")
    about = "where to save the threshold and scale of each step"
    command.add_argument("--output", metavar="CSV", help=about)
    command.add_argument("--json", action="store_true", help="print JSON")
    add_options(command)

    about = "print statistics of the norms and a suggested threshold with reasons"
    command = add_command(commands, "suggest", run_suggest, about)
    add_until(command)
    command.add_argument("--json", action="store_true", help="print JSON")

    about = "write one HTML page about a run: summary, advice, pictures"
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
    command.add_argument("file", metavar="FILE", help='file or folder of a run, or "-"')
    command.add_argument("--column", metavar="NAME", help="the column of the norms")
    return command


def add_until(command: argparse.ArgumentParser) -> None:
    """Add the option --until."""
    about = "read only the steps before N"
    command.add_argument("--until", metavar="N", type=parse_count, help=about)


def parse_count(text: str) -> int:
    """Return a number of steps, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text}")
    return int(text)
