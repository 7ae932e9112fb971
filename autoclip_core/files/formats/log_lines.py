"""Finds the step and the gradient norms in a line that a training script printed.

A name of a gradient norm, then a number, is a norm. "step" or "iteration", then a whole
number, is a step. These rules hold for every project.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from autoclip_core.files.names import find_norm_name

COLOR = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
"""Escape sequences of a terminal: colours, movements, titles and links."""

VALUE = (
    r"[+-]?(?:nan|inf(?:inity)?|\d{1,3}(?:,\d{3})+(?:\.\d+)?|"
    r"\d+\.?\d*(?:e[+-]?\d+)?[KMGBT]?|\.\d+(?:e[+-]?\d+)?)|none|null|n/a"
)

GAP = r"\s{0,20}"
"""White space; its length is limited so that no text makes the search slow."""

BETWEEN = (
    rf"""["'\]]?{GAP}(?:[:=|\u2502]|->|\bis\b|\bof\b)?{GAP}"""
    rf"""["'(]?(?:[A-Za-z][\w.]{{0,30}}\()?{GAP}"""
)
"""What may stand between a name and its number, such as `tensor(` or a table's bar."""

AFTER = r"(?![\w%]|\.\w|/\d)"
"""A number with a unit or a percent sign is no norm."""

WORD = r"[A-Za-z_][\w./-]{0,120}"

NAME_END = (
    r"[\w./-]{0,120}(?: (?:of|the|all|total|gradients?|grads?|"
    r"last|avg|average|mean|before|after|clip|clipping|clipped)\b){0,4}"
)
"""The end of a name after "norm"; more words follow in "norm of the gradient"."""

NUMBER_AFTER_NAME = re.compile(
    rf"(?P<end>{NAME_END}){BETWEEN}(?P<value>{VALUE}){AFTER}", re.IGNORECASE
)

TOKEN = re.compile(r"[\w./-]*")

REVERSED_START = re.compile(r"[\w./-]*(?: [\w./-]*[A-Za-z_](?![\w./-])){0,3}")
"""The start of a name before "norm", read from its end."""

MAX_NAME = 80
"""Number of characters before "norm" that can belong to the name."""

PAIR = re.compile(
    rf"(?<![\w./-])(?P<name>{WORD}(?: {WORD}){{0,3}}?){BETWEEN}{VALUE}{AFTER}",
    re.IGNORECASE,
)
"""Any name before a number, for errors."""

STEP = re.compile(
    r"(?:(?P<best>global[_ ]?step(?:/max_steps)?|num_updates)|"
    r"step|iter|iteration|it|batch|update)"
    rf"""["']?{GAP}[:=#]?{GAP}["'\[(]?{GAP}(?P<step>\d+(?:,\d{{3}})*)"""
    r"""(?:\.0+)?(?![\d.]\d|[a-z\d%]|(?:, \d+)+\])"""
)
"""A step in a line in lower case, but not [epoch, step]. What stands before it is
checked separately."""

BRACKETS = re.compile(
    r"(?:\]\[ {0,9}(?=\d+/\d+\])|\.py:\d+\] \[(?=\d+\] [\w./-]+=))(\d+)"
)
"""A step without a name, as in "[epoch][step/steps]" or "file.py:48] [step] loss="."""

EPOCH = re.compile(
    r"(?:(?<![a-z_])ep(?:och)?(?:\(train\))?[^a-z\d]{0,8}|"
    r"\[(?=\d+(?:/\d+)?\]\[ {0,9}\d+/\d+\]))(\d+(?:\.\d+)?)"
)
"""An epoch in a line in lower case."""

STEP_FOLDERS = ("train/", "trainer/", "training/")

DIGITS = bytes.maketrans(b"123456789\0", b"0000000002")
"""Makes all digits of a line 0, and \\0 the digit of "l2", which is part of a name."""

MAX_SHAPE = 2000
"""Number of characters of a line whose shape is kept, at most."""


class Places(NamedTuple):
    """Where a line has its step, and the names and the numbers of its norms."""

    step: slice | None
    epoch: slice | None
    start: int
    """Where the text begins that each rank prints: behind its rank and the time."""
    norms: tuple[tuple[slice, slice], ...]

    def read_norms(self, line: str) -> dict[str, str]:
        """Return the numbers of the gradient norms by name; the first of each name."""
        norms: dict[str, str] = {}
        for name, value in self.norms:
            norms.setdefault(line[name], line[value])
        return norms


def find_places(line: str) -> Places:
    """Return the places in a line.

    They depend on its shape: most lines of a log have the shape of an earlier line.
    """
    shape = line.encode().replace(b"l2", b"l\0").replace(b"L2", b"L\0")
    shape = shape.translate(DIGITS)
    if len(shape) > MAX_SHAPE:
        return find_places_in_shape.__wrapped__(shape)
    return find_places_in_shape(shape)


@lru_cache(maxsize=4096)
def find_places_in_shape(shape: bytes) -> Places:
    """Return the places in a line whose digits are all 0, except those of "l2"."""
    line = shape.decode()
    lower = line.lower()
    if len(lower) != len(line):  # a letter has two in lower case
        lower = line
    step, norms = find_step(lower), tuple(find_norms(line, lower))
    match = EPOCH.search(lower)
    epoch = slice(*match.span(1)) if match else None
    starts = [place.start for place in (step, epoch, *(n for n, _ in norms)) if place]
    return Places(step, epoch, min(starts, default=0), norms)


def find_norms(line: str, lower: str) -> Iterator[tuple[slice, slice]]:
    """Yield the places of the name and the number of each gradient norm in a line."""
    word = "norm" if "norm" in lower or "l2" not in lower else "grad"
    place = lower.find(word)
    while place >= 0:
        match = NUMBER_AFTER_NAME.match(line, place)
        if match:
            before = line[max(place - MAX_NAME, 0) : place][::-1]
            start = REVERSED_START.match(before)
            name = find_norm_name((start[0][::-1] if start else "") + match["end"])
            if name:
                end = match.end("end")
                yield slice(end - len(name), end), slice(*match.span("value"))
        token = match or TOKEN.match(line, place)
        place = lower.find(word, token.end() if token else place + 1)


def find_step(line: str) -> slice | None:
    """Return the place of the step that a line in lower case states, or None.

    >>> find_step("[step=10/739328,epoch=0]"), find_step("it took 2.5 s per step")
    (slice(6, 8, None), None)
    """
    first = None
    for match in STEP.finditer(line):
        start = match.start()
        before = line[start - 1 : start]
        if before.isalnum() or before in ("_", ".", "-", "/"):
            if not line.endswith(STEP_FOLDERS, 0, start):
                continue
        place = slice(*match.span("step"))
        if match["best"]:
            return place
        first = first or place
    bracket = None if first else BRACKETS.search(line)
    return slice(*bracket.span(1)) if bracket else first


def read_named(line: str, column: str) -> dict[str, str]:
    """Return the number behind a given name in a line, by that name, if there is one.

    >>> read_named("loss 2.5, my norm: 0.5", "my norm")
    {'my norm': '0.5'}
    """
    pair = rf"(?<![\w/.]){re.escape(column)}{BETWEEN}({VALUE}){AFTER}"
    match = re.search(pair, line, re.IGNORECASE)
    return {column: match[1]} if match else {}
