"""Change the core one operator at a time; say which changes no test notices.

Run it as `python tests/support/mutants.py`, or for some files as
`python tests/support/mutants.py scale.py history/window.py`. Each mutant is a copy of
the package in a temporary folder with one comparison, operator, constant or choice
replaced. The tests run there until the first fails; a mutant that survives them all is
printed, unless the table below explains it. The working tree is only read. A mutant
that is noticed takes one or two seconds, one that survives as long as its tests; all of
them an hour.
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
"""Of computing, after which the tests of a mutant are taken for endless."""

FAST = ["checks", "scale", "combinators"]
TESTS = {
    "history/validation.py": ["validation", "window", "moments"],
    "checks.py": ["checks"],
    "policies/combinators.py": [*FAST, "validation", "policies"],
    "policies/zscore.py": [*FAST, "validation", "policies", "golden", "laws"],
    "policies/ema_ratio.py": [*FAST, "validation", "policies", "golden", "laws"],
    "policies/fixed.py": [*FAST, "policies", "decide"],
    "history/full.py": ["full_history", "policies"],
    "record/row_counts.py": ["row_counts", "log_bounded"],
    "record/step.py": ["log_step", "clip_log", "log_bounded"],
    "log/advice.py": ["log_summary", "clip_log"],
    "log/summary.py": ["log_summary", "clip_log"],
    "record/totals.py": ["log_totals"],
    "policies/mean_std.py": [*FAST, "policies", "golden"],
    "clipper/metrics.py": ["metrics", "validation"],
    "history/moments.py": ["moments", "policies", "golden"],
    "policies/param_ratio.py": [*FAST, "policies", "golden"],
    "clipper/patterns.py": ["patterns"],
    "policy.py": [*FAST, "policies", "decide", "laws", "full_history"],
    "policies/quantile.py": [*FAST, "validation", "policies", "golden", "laws"],
    "policies/streaming_quantile.py": [
        *FAST,
        "validation",
        "policies",
        "golden",
        "laws",
    ],
    "planning/replay.py": ["replay", "spikes"],
    "scale.py": [*FAST, "decide", "policies"],
    "clipper/settings.py": ["settings"],
    "planning/spikes.py": ["spikes"],
    "planning/suggest.py": ["suggest"],
    "history/lookup.py": ["window", "policies"],
    "clipper/units.py": ["units"],
    "clipper/by_value.py": ["by_value"],
    "history/window.py": ["window", "policies"],
}
"""What decides or tells a number, and the tests that have to notice a change."""

EQUIVALENT = {
    # One more entry, which is never looked up.
    "history/lookup.py": [("1 -> 2", "np.arange(maximum + 1)")],
    # What `where` discards, or `decide` drops.
    "scale.py": [("1.0 -> 1.01", "divisor = xp.where(clipped, norms, 1.0)")],
    "policies/mean_std.py": [("0.0 -> 1.0", "xp.where(has_std, std, 0.0)")],
    "history/moments.py": [("1.0 -> 1.01", "np.where(norms > 0, norms, 1.0)")],
    "history/window.py": [
        ("0.0 -> 1.0", "below = xp.where(has_norms, below, 0.0)"),
        ("0.0 -> 1.0", "above = xp.where(has_norms, above, 0.0)"),
        ("1.0 -> 1.01", "largest = xp.where(has_norms, picked[:, 0], 1.0)"),
        ("1.0 -> 1.01", "middle = xp.where(has_norms, picked[:, 1], 1.0)"),
        ("1.0 -> 1.01", "smallest = xp.where(has_norms, values[:, 0], 1.0)"),
        # One norm lies 0 from its own middle, by whatever that is divided.
        ("1 -> 2", "return np.maximum(n, 1).astype"),
        # By what is divided, and multiplied again.
        ("divisor / divisor -> divisor * divisor", ""),
        # Where both are equal, either branch gives that number.
        ("window.count < length -> window.count <= length", ""),
        # From where a mean is measured: of an even number either middle one will do.
        ("1 -> 2", "half = (n[:, None] + 1) // 2"),
    ],
    # What is no number gets no hint, and 1 does not either.
    "checks.py": [("0.0 -> 1.0", "isinstance(value, numbers.Real) else 0.0")],
    "clipper/metrics.py": [
        # What `where` discards, or is the same in every row, or is all of one.
        ("xp.any -> xp.all", "one(xp.any(decision.skipped))"),
        ("1.0 -> 1.01", "unit = xp.where(largest > 0, largest, 1.0)"),
        ("0 -> 1", "xp.where(total > 0, total, 1)"),
        ("1 -> 2", "xp.where(total > 0, total, 1)"),
        # Of no threshold every place holds +inf, of one both are the first.
        ("count > 0 -> count >= 0", ""),
        ("0 -> 1", "below = xp.where(count > 0, count - 1, count)"),
    ],
    # A row beside the first, which alone is told.
    "planning/replay.py": [("1 -> 2", "policy.init(1)")],
    # Where all norms are 0, by what they are divided.
    "planning/suggest.py": [
        ("1.0 -> 1.01", "float(finite.max()) or 1.0"),
        # By what both are divided.
        ("2 -> 3", "halves = norms / 2"),
    ],
    # No row joins; an integer beyond all floats is neither 0 nor 1; a device costs
    # transfers, which the tests with torch count, and changes no number.
    "record/row_counts.py": [
        ("rows > len(self.names) -> rows >= len(self.names)", ""),
    ],
    "record/step.py": [
        ("value > 0 -> value >= 0", "math.inf if value > 0 else"),
        ("0 -> 1", "math.inf if value > 0 else"),
        ("norm.device.type == 'cpu' -> norm.device.type != 'cpu'", ""),
    ],
    # What equals the end of a regime was told as within it.
    "log/advice.py": [("rate > b -> rate >= b", "")],
    # The size of a buffer: when norms are merged changes no number.
    "history/full.py": [
        ("1024 -> 1025", "RECENT = 1024"),
        # A part without norms is asked as well, and has none of them.
        ("old.shape[1] > 2 -> old.shape[1] >= 2", ""),
        # A bisection that begins lower ends where it did.
        ("first + 1 -> first - 1", "least = 0 if between else"),
        # Of equal norms either comes first.
        ("longest[rest] <= norm -> longest[rest] < norm", ""),
    ],
    # The size of the pieces that a long series is looked at in.
    "planning/spikes.py": [
        ("2 -> 3", "MAX_STEPS = 2"),
        ("16 -> 17", "MAX_STEPS = 2"),
        # What is left to rounding.
        ("1e-09 -> 1.01e-09", "if largest <"),
        ("1e-09 -> 1.01e-09", "abs(change) >= largest"),
        ("abs(change) >= largest - 1e-09 -> abs(change) > largest - 1e-09", ""),
        (
            "largest < math.log(MIN_SHIFT) - 1e-09 -> "
            "largest <= math.log(MIN_SHIFT) - 1e-09",
            "",
        ),
    ],
    # Where both are equal, either branch gives that number.
    "policies/param_ratio.py": [
        ("param_norms > self.eps -> param_norms >= self.eps", "")
    ],
    "policies/zscore.py": [
        ("count < max_count -> count <= max_count", ""),
        # The target of a norm that is not above its threshold is never used.
        ("norms > threshold -> norms >= threshold", "above ="),
        ("norms > limit.threshold -> norms >= limit.threshold", ""),
        # What `where` discards, or 0 is divided by.
        ("1.0 -> 1.01", "excess = xp.where(spread > 0, norms - mean, 1.0)"),
        ("1.0 -> 1.01", "unit = xp.where(largest > 0, largest, 1.0)"),
        ("1.0 -> 1.01", "xp.where(total > 0, total, 1.0)"),
    ],
    "policies/combinators.py": [
        ("inner.threshold > self.max_norm -> inner.threshold >= self.max_norm", ""),
        ("inner.target > self.max_norm -> inner.target >= self.max_norm", ""),
        ("inner.threshold < self.min_norm -> inner.threshold <= self.min_norm", ""),
        ("inner.target < self.min_norm -> inner.target <= self.min_norm", ""),
        ("inner.target > 0 -> inner.target >= 0", "where(inner.target > 0, 0.0"),
    ],
}
"""Mutants that compute the same: a change, and what its line says besides."""

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

Slot = tuple[ast.AST, Callable[[ast.AST], None]]


def slots(node: ast.AST) -> Iterator[Slot]:
    """Yield what a change can replace, and how.

    Errors, annotations and the `strict=True` of a zip are left out.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        several = isinstance(value, list)
        for place, child in enumerate(value if several else [value]):
            if isinstance(child, ast.AST) and not left_out(child):
                put = partial(value.__setitem__, place) if several else None
                yield child, put or partial(setattr, node, field)
                yield from slots(child)


def left_out(node: ast.AST) -> bool:
    """Return whether nothing is to be changed in a node."""
    strict = isinstance(node, ast.keyword) and node.arg == "strict"
    return strict or isinstance(node, ast.Raise)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what stands in the place of a node in each of its mutants."""
    match node:
        case ast.Compare(left, ops, rights):
            for place, op in enumerate(ops):
                for other in COMPARISONS.get(type(op), []):
                    changed = [*ops[:place], other(), *ops[place + 1 :]]
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
        case ast.Call(ast.Attribute(_, "where") as where, [condition, one, other]):
            yield ast.Call(where, [condition, other, one], [])


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield what each mutant changes, and its source."""
    tree = ast.parse(source)
    for node, put in list(slots(tree)):
        for changed in changes(node):
            put(changed)
            yield words(node, changed), ast.unparse(ast.fix_missing_locations(tree))
            put(node)


def words(node: ast.AST, changed: ast.AST) -> str:
    """Return in words what a mutant changes."""
    return f"{node.lineno}: {ast.unparse(node)}  ->  {ast.unparse(changed)}"


def explained(file: str, source: str, what: str) -> bool:
    """Return whether a mutant is one that computes the same."""
    number, change = what.split(": ", 1)
    change, line = (
        change.replace("  ->  ", " -> "),
        source.splitlines()[int(number) - 1],
    )
    alike = EQUIVALENT.get(file, [])
    return any(change == known and beside in line for known, beside in alike)


def survives(folder: Path, tests: list[str]) -> bool:
    """Return whether all tests pass; a mutant that makes them endless does not."""
    child = multiprocessing.get_context("fork").Process(
        target=run_tests,
        args=(folder, [f"tests/core/test_{name}.py" for name in tests]),
    )
    child.start()
    child.join()
    return child.exitcode == 0


def run_tests(folder: Path, files: list[str]) -> None:
    """Run in a child: the package of the folder is the only one there is."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    sys.dont_write_bytecode = True  # two mutants of one second have the same time
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # The tests that noticed the mutants before run first: one of them often does again.
    options = ["-x", "-q", "-m", "not needs", "--failed-first"]
    # pytest would rewrite what the parent has imported for it.
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(pytest.main([*options, *files], plugins=[AnyFailure()]))


class AnyFailure:
    """A plugin for pytest: an example that fails is not made smaller, for nobody looks.

    It takes the settings as the tests made them; so there are as many examples.
    """

    def pytest_configure(self) -> None:
        """Leave out what follows a failure."""
        phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.target]
        settings.register_profile("any failure", settings.default, phases=phases)
        settings.load_profile("any failure")


def copied(folder: Path) -> Path:
    """Return the folder, with a copy of what the tests of the package need."""
    for part in (PACKAGE, "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    return folder


def survivors(folder: Path, file: str, every: int) -> int:
    """Try the mutants of a file, print and count those that survive unexplained."""
    path = folder / PACKAGE / file
    source = path.read_text(encoding="utf-8")
    if not survives(folder, TESTS[file]):
        sys.exit(f"{file}: its tests fail as they are")
    tried = list(mutants(source))[::every]
    alike = [what for what, _ in tried if explained(file, source, what)]
    survived = 0
    for what, mutant in tried:
        path.write_text(mutant, encoding="utf-8")
        if what not in alike and survives(folder, TESTS[file]):
            survived += 1
            print(f"{file}:{what}", flush=True)
    path.write_text(source, encoding="utf-8")
    numbers = f"{len(tried)} mutants, {len(alike)} explained, {survived} survived"
    print(f"{file}: {numbers}", flush=True)
    return survived


def main() -> int:
    """Try the mutants and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("files", nargs="*", choices=[*TESTS, []], default=list(TESTS))
    add("--every", type=int, default=1, help="try one in so many (default all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        found = sum(survivors(folder, file, options.every) for file in options.files)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
