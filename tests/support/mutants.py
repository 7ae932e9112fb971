"""Change the core one operator at a time, and print the changes that no test detects.

Run `python tests/support/mutants.py` for all files, or name some files:
`python tests/support/mutants.py scale.py history/window.py`. A mutant is a copy of the
package in a temporary folder, in which one comparison, operator, constant or choice is
replaced. The tests run there until one fails. A mutant that survives all tests is
printed, unless `EQUIVALENT` explains it. The working tree is only read. A detected
mutant takes one or two seconds, a survivor takes as long as its tests. All mutants
together take an hour.
"""

import argparse
import ast
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np  # noqa: F401  (each child would import it again)
import pytest
from hypothesis import Phase, settings

ROOT = Path(__file__).parents[2]
PACKAGE = "autoclip_core"
SECONDS = 300
"""CPU seconds after which the tests of a mutant count as endless."""

FAST = ["checks", "scale", "combinators"]
TESTS = {
    "history/averages.py": ["policies"],
    "history/validation.py": ["validation", "window", "moments"],
    "checks.py": ["checks"],
    "scalars.py": ["decide"],
    "policies/combinators.py": [*FAST, "validation", "policies"],
    "policies/drop.py": [*FAST, "validation", "policies", "loss", "laws"],
    "policies/zscore.py": [*FAST, "validation", "policies", "golden", "loss", "laws"],
    "policies/ema_ratio.py": [*FAST, "validation", "policies", "golden", "laws"],
    "policies/fixed.py": [*FAST, "policies", "decide", "loss"],
    "policies/schedule.py": [*FAST, "validation", "policies", "golden", "loss"],
    "history/full.py": ["full_history", "policies"],
    "record/row_counts.py": ["row_counts", "log_bounded"],
    "record/step.py": ["log_step", "clip_log", "log_bounded"],
    "record/statistics.py": ["log_step", "log_summary", "log/red_lights", "replay"],
    "record/largest.py": ["log/largest"],
    "record/repeats.py": ["log/repeats"],
    "record/read_metrics.py": ["log/largest", "log/updates", "log_step", "clip_log"],
    "record/saved.py": ["log/largest", "log/updates", "clip_log", "log_bounded"],
    "log/red_lights.py": ["log/red_lights", "clipped_before"],
    "log/advice.py": ["log_summary", "clip_log", "log/red_lights"],
    "log/rate_advice.py": ["log_summary", "clip_log", "log/red_lights"],
    "log/settings.py": ["log/red_lights", "log_summary"],
    "log/summary.py": ["log_summary", "clip_log"],
    "record/totals.py": ["log_totals"],
    "policies/mean_std.py": [*FAST, "policies", "golden", "loss"],
    "clipper/metrics.py": ["metrics", "norms", "validation"],
    "clipper/norms.py": ["norms", "metrics"],
    "history/moments.py": ["moments", "policies", "golden"],
    "history/moving.py": [*FAST, "validation", "policies", "golden", "loss", "laws"],
    "policies/param_ratio.py": [*FAST, "policies", "golden"],
    "clipper/parts.py": ["parts"],
    "clipper/patterns.py": ["patterns"],
    "policy.py": [*FAST, "policies", "decide", "loss", "laws", "full_history"],
    "decision.py": [*FAST, "policies", "decide", "laws", "loss"],
    "loss.py": ["loss"],
    "policies/quantile.py": [*FAST, "validation", "policies", "golden", "loss", "laws"],
    "policies/streaming_quantile.py": [
        *FAST,
        "validation",
        "policies",
        "golden",
        "laws",
    ],
    "planning/replay.py": ["replay", "series/spikes"],
    "scale.py": [*FAST, "decide", "policies", "norms", "window"],
    "clipper/settings.py": ["settings"],
    "series/ceiling.py": ["series/damage"],
    "series/damage.py": ["series/damage"],
    "series/diagnosis.py": ["series/diagnosis", "series/damage", "suggest"],
    "series/levels.py": ["series/damage"],
    "series/losses.py": ["cli"],
    "series/ratchet.py": ["log/red_lights"],
    "series/shifts.py": ["series/shifts", "series/damage", "series/spikes"],
    "series/spikes.py": ["series/spikes"],
    "planning/suggest.py": ["suggest"],
    "planning/constant.py": ["suggest"],
    "planning/reasons.py": ["suggest"],
    "history/lookup.py": ["window", "policies"],
    "clipper/units.py": ["units"],
    "clipper/by_value.py": ["by_value"],
    "clipper/metrics_checks.py": ["clipped_before", "metrics"],
    "history/ranks.py": ["window", "policies", "full_history"],
    "history/window.py": ["window", "policies"],
}
"""The files that compute or report a number, and the tests that detect a change."""

EQUIVALENT = {
    # The table gets one more entry, which no test and no code reads.
    "history/lookup.py": [("1 -> 2", "np.arange(maximum + 1)")],
    # `where` or `decide` discards the value.
    "scale.py": [
        ("1.0 -> 1.01", "divisor = xp.where(is_above, norms, 1.0)"),
        # If all magnitudes are 0, their divisor does not matter.
        ("1.0 -> 1.01", "divisor = xp.where(magnitudes > 0, magnitudes, 1.0)"),
        # If both are equal, either branch gives that number.
        ("divisor < LARGEST_DIVISOR -> divisor <= LARGEST_DIVISOR", ""),
        ("threshold > 0 -> threshold >= 0", "is_drop = (threshold > 0)"),
        ("threshold < drop -> threshold <= drop", ""),
        ("limit.threshold > limit.drop -> limit.threshold >= limit.drop", ""),
        # Only XLA flushes, which the JAX and Keras tests run.
        ("8.507059173023462e+37 -> 8.592129764753696e+37", "LARGEST_DIVISOR"),
    ],
    "policies/mean_std.py": [("0.0 -> 1.0", "xp.where(has_std, std, 0.0)")],
    "history/moments.py": [("1.0 -> 1.01", "np.where(norms > 0, norms, 1.0)")],
    # `where` discards the value.
    "history/ranks.py": [
        ("0.0 -> 1.0", "below = xp.where(has_norms, below, 0.0)"),
        ("0.0 -> 1.0", "above = xp.where(has_norms, above, 0.0)"),
    ],
    "history/window.py": [
        ("1.0 -> 1.01", "largest = xp.where(has_norms, picked[:, 0], 1.0)"),
        ("1.0 -> 1.01", "middle = xp.where(has_norms, picked[:, 1], 1.0)"),
        ("1.0 -> 1.01", "smallest = xp.where(has_norms, values[:, 0], 1.0)"),
        # A single norm is its own middle: its offset is 0 with any divisor.
        ("1 -> 2", "return np.maximum(n, 1).astype"),
        # The result is divided by the unit and multiplied by it.
        ("divisor / divisor -> divisor * divisor", ""),
        # If both are equal, either branch gives that number.
        ("window.count < length -> window.count <= length", ""),
        # Without a norm the unit divides no norm.
        ("1.0 -> 1.01", "lowest = xp.where(has_norms, values[:, 0], 1.0)"),
        # The mean may be measured from either middle norm of an even number.
        ("1 -> 2", "half = (n[:, None] + 1) // 2"),
    ],
    # A value that is not a number gets no hint, and 1 gets none either.
    "checks.py": [("0.0 -> 1.0", "isinstance(value, numbers.Real) else 0.0")],
    "clipper/metrics.py": [
        # `where` discards the value, or it is the same in every row.
        ("xp.any -> xp.all", "as_count(xp.any(decision.skipped))"),
        ("0 -> 1", "xp.where(total > 0, total, 1)"),
        ("1 -> 2", "xp.where(total > 0, total, 1)"),
        # Without a threshold every place holds +inf; with one, both are the first.
        ("count > 0 -> count >= 0", ""),
        ("0 -> 1", "below = xp.where(count > 0, count - 1, count)"),
    ],
    "clipper/norms.py": [
        # A row without elements has the norm 0. Equal numbers give one result.
        ("1.0 -> 1.01", "sizes, 1.0)"),
        ("sizes > 1 -> sizes >= 1", ""),
    ],
    # The replay reports only the first row.
    "planning/replay.py": [("1 -> 2", "policy.init(1)")],
    # Whether a policy cancels updates does not depend on the number of rows.
    "clipper/settings.py": [
        ("1 -> 2", "policy.init(1, xp)"),
        ("1 -> 2", "policy.init(1), norm"),
        ("1 -> 2", "norm = np.ones(1, np.float32)"),
    ],
    # `select_rows` and `skipped` discard what follows from it. There is one loss.
    "loss.py": [
        ("0.0 -> 1.0", "valid_loss = xp.where(finite, loss, 0.0)"),
        ("xp.any -> xp.all", "xp.any(skipped)"),
        # Infinity is no number.
        ("0 -> 1", "no = threshold == 0"),
    ],
    # If all norms are 0, their divisor does not matter.
    "planning/suggest.py": [
        ("1.0 -> 1.01", "float(norms.max()) or 1.0"),
    ],
    # 0 divided by another number is 0, too.
    "record/largest.py": [
        ("1.0 -> 1.01", "np.where(is_known, below, 1.0)"),
        # A ratio of 1 is not kept.
        ("0.0 -> 1.0", "max(rows.values(), default=0.0)"),
        ("steps['clipped'] > 0 -> steps['clipped'] >= 0", ""),
        # What is beyond the twentieth step is removed at once.
        ("len(self.steps) < MOST -> len(self.steps) <= MOST", ""),
        ("ratio > self.steps[-1].ratio -> ratio >= self.steps[-1].ratio", ""),
        # A norm that is not finite is not clipped.
        (
            "(steps['clipped'] > 0) & np.isfinite(steps['norm']) -> "
            "(steps['clipped'] > 0) | np.isfinite(steps['norm'])",
            "",
        ),
        ("0.0 -> 1.0", "return 0.0"),
        # The norm over an infinite threshold is 0.
        ("0 < step.threshold < math.inf -> 0 < step.threshold <= math.inf", ""),
        ("0.0 -> 1.0", "ratios.max(initial=0.0)"),
    ],
    # No row joins if the numbers are equal. An integer beyond every float is neither 0
    # nor 1. The device changes no number, only transfers, which the torch tests count.
    "record/row_counts.py": [
        ("rows > len(self.names) -> rows >= len(self.names)", ""),
    ],
    "record/step.py": [
        ("value > 0 -> value >= 0", "math.inf if value > 0 else"),
        ("0 -> 1", "math.inf if value > 0 else"),
        ("norm.device.type == 'cpu' -> norm.device.type != 'cpu'", ""),
    ],
    # The size of a buffer: the time of a merge changes no number.
    "history/full.py": [
        ("1024 -> 1025", "RECENT = 1024"),
        # A part without norms contributes nothing.
        ("old.shape[1] > 2 -> old.shape[1] >= 2", ""),
        # A bisection with a lower start ends at the same place.
        ("first + 1 -> first - 1", "least = 0 if between else"),
        # Two equal norms may come in either order.
        ("longest[rest] <= norm -> longest[rest] < norm", ""),
    ],
    # The size of the pieces of a long series.
    "series/spikes.py": [
        ("2 -> 3", "MAX_STEPS = 2"),
        ("16 -> 17", "MAX_STEPS = 2"),
    ],
    # A tolerance for rounding.
    "series/shifts.py": [
        ("1e-09 -> 1.01e-09", "if largest <"),
        ("1e-09 -> 1.01e-09", "abs(change) >= largest"),
        ("abs(change) >= largest - 1e-09 -> abs(change) > largest - 1e-09", ""),
        (
            "largest < math.log(MIN_SHIFT) - 1e-09 -> "
            "largest <= math.log(MIN_SHIFT) - 1e-09",
            "",
        ),
    ],
    # If both are equal, either branch gives that number.
    "policies/param_ratio.py": [
        ("param_norms > self.eps -> param_norms >= self.eps", "is_valid = "),
        ("param_norms > self.eps -> param_norms >= self.eps", "has_norm = "),
        # Threshold and target are one array.
        ("0 -> 1", "threshold = super().limit("),
    ],
    "policies/zscore.py": [
        # The target of a norm up to its threshold is never used.
        ("norms > threshold -> norms >= threshold", "above ="),
        ("norms > limit.threshold -> norms >= limit.threshold", ""),
        # `where` discards the value.
        ("1.0 -> 1.01", "excess = xp.where(spread > 0, distance, 1.0)"),
    ],
    "history/moving.py": [
        # If both are equal, either branch gives that number.
        ("count < warmup_steps -> count <= warmup_steps", "n = "),
        # `where` discards the value, or 0 is divided by it.
        ("1.0 -> 1.01", "unit = xp.where(largest > 0, largest, 1.0)"),
        ("1.0 -> 1.01", "xp.where(total > 0, total, 1.0)"),
        # Without a norm or a mean the offset is discarded, or has the weight 0.
        ("1.0 -> 1.01", "divisor = xp.where(has_both, mean, 1.0)"),
        ("1.0 -> 1.01", "divide(xp.where(has_both, norms, 1.0)"),
        ("norms > 0 -> norms >= 0", ""),
    ],
    "policies/combinators.py": [
        ("threshold > self.max_norm -> threshold >= self.max_norm", ""),
        ("target > self.max_norm -> target >= self.max_norm", ""),
        ("threshold < self.min_norm -> threshold <= self.min_norm", ""),
        ("target < self.min_norm -> target <= self.min_norm", ""),
        ("drop < self.min_norm -> drop <= self.min_norm", ""),
    ],
    # At a point the weighted mean is the threshold of the point.
    "policies/schedule.py": [
        ("k > step -> k >= step", ""),
        ("k < next_step -> k <= next_step", ""),
        # Beyond the next point, the threshold of that point replaces the mean.
        ("(k > step) & (k < next_step) -> (k > step) | (k < next_step)", ""),
    ],
    # `where` discards the value.
    "clipper/parts.py": [
        ("1.0 -> 1.01", "norms = xp.where("),
        ("1.0 -> 1.01", "before = xp.where("),
    ],
    "policies/drop.py": [("drop > clip_drop -> drop >= clip_drop", "")],
}
"""Mutants that compute the same: the change, and a part of the changed line."""

COMPARISONS = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NAMES = {"minimum": "maximum", "min": "max", "any": "all", "floor": "ceil"}
NAMES |= {new: old for old, new in NAMES.items()}

Place = tuple[ast.AST, Callable[[ast.AST], None]]


def find_places(node: ast.AST) -> Iterator[Place]:
    """Yield each node that a change can replace, and a function that replaces it.

    Errors, annotations and the `strict=True` of a zip are left out.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        is_list = isinstance(value, list)
        for index, child in enumerate(value if is_list else [value]):
            if isinstance(child, ast.AST) and not is_left_out(child):
                put = partial(value.__setitem__, index) if is_list else None
                yield child, put or partial(setattr, node, field)
                yield from find_places(child)


def is_left_out(node: ast.AST) -> bool:
    """Return whether a node is left out."""
    strict = isinstance(node, ast.keyword) and node.arg == "strict"
    return strict or isinstance(node, ast.Raise)


def make_replacements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes that replace a node in its mutants."""
    match node:
        case ast.Compare(left, ops, rights):
            for index, op in enumerate(ops):
                for other in COMPARISONS.get(type(op), []):
                    changed = [*ops[:index], other(), *ops[index + 1 :]]
                    yield ast.Compare(left, changed, rights)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OPERATORS[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.Invert() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            whole = isinstance(value, int) or value == 0
            yield ast.Constant(value + 1 if whole else value * 1.01)
        case ast.Attribute(of, name) if name in NAMES:
            yield ast.Attribute(of, NAMES[name])
        case ast.Name(name) if name in NAMES:
            yield ast.Name(NAMES[name])
        case ast.Call(ast.Attribute(_, "where") as where, [condition, first, second]):
            yield ast.Call(where, [condition, second, first], [])


def make_mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield the change and the source of each mutant."""
    tree = ast.parse(source)
    for node, put in list(find_places(tree)):
        for changed in make_replacements(node):
            put(changed)
            change = describe_change(node, changed)
            yield change, ast.unparse(ast.fix_missing_locations(tree))
            put(node)


def describe_change(node: ast.AST, changed: ast.AST) -> str:
    """Return the change of a mutant as a line of text."""
    return f"{node.lineno}: {ast.unparse(node)}  ->  {ast.unparse(changed)}"


def is_explained(file: str, source: str, what: str) -> bool:
    """Return whether `EQUIVALENT` explains a mutant."""
    number, change = what.split(": ", 1)
    change, line = (
        change.replace("  ->  ", " -> "),
        source.splitlines()[int(number) - 1],
    )
    equivalent = EQUIVALENT.get(file, [])
    return any(change == known and part in line for known, part in equivalent)


def survives(folder: Path, tests: list[str]) -> bool:
    """Return whether all tests pass within the time limit."""
    child = multiprocessing.get_context("fork").Process(
        target=run_tests,
        args=(folder, [test_file(name) for name in tests]),
    )
    child.start()
    child.join()
    return child.exitcode == 0


def test_file(name: str) -> str:
    """Return the path of a test file of the core; its name may begin with a folder."""
    folder, _, name = name.rpartition("/")
    return str(Path("tests/core", folder, f"test_{name}.py"))


def run_tests(folder: Path, files: list[str]) -> None:
    """Run the tests in a child process, with the package of the folder."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.dont_write_bytecode = True  # two mutants may have the same time stamp
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # Tests that detected earlier mutants run first: one of them often fails again.
    options = ["-x", "-q", "-m", "not needs", "--failed-first"]
    # The parent has already imported modules that pytest would rewrite.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(pytest.main([*options, *files], plugins=[AnyFailure()]))


class AnyFailure:
    """A plugin for pytest: Hypothesis does not shrink a failing example.

    The number of examples stays as the tests set it.
    """

    def pytest_configure(self) -> None:
        """Leave out the phases after a failure."""
        phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target]
        settings.register_profile("any failure", settings.default, phases=phases)
        settings.load_profile("any failure")


def copy_package(folder: Path) -> Path:
    """Copy the files that the tests need into the folder, and return it."""
    for part in (PACKAGE, "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    return folder


def count_survivors(folder: Path, file: str, every: int) -> int:
    """Try the mutants of a file; print and count the unexplained survivors."""
    path = folder / PACKAGE / file
    source = path.read_text(encoding="utf-8")
    if not survives(folder, TESTS[file]):
        sys.exit(f"{file}: its tests fail without any mutant")
    tried = list(make_mutants(source))[::every]
    equivalent = [what for what, _ in tried if is_explained(file, source, what)]
    survived = 0
    for what, mutant in tried:
        path.write_text(mutant, encoding="utf-8")
        if what not in equivalent and survives(folder, TESTS[file]):
            survived += 1
            print(f"{file}:{what}", flush=True)
    path.write_text(source, encoding="utf-8")
    numbers = f"{len(tried)} mutants, {len(equivalent)} explained, {survived} survived"
    print(f"{file}: {numbers}", flush=True)
    return survived


def main() -> int:
    """Try the mutants of the given files and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("files", nargs="*", choices=[*TESTS, []], help="(default all)")
    add("--every", type=int, default=1, help="try every n-th mutant (default all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = copy_package(Path(name))
        count = partial(count_survivors, folder, every=options.every)
        survivors = sum(map(count, options.files or TESTS))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
