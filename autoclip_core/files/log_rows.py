"""Reads what a training script printed, by one rule for every project.

A name of a gradient norm, then a number, is a norm. "step" or "iteration", then a whole
number, is its step; it may stand on an earlier line. A progress bar shows a norm more
than once.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from .names import GRADIENT_WORDS, NORM_WORDS, rank_name, split_words

COLOR = re.compile(r"\x1b\[[0-9;:?]*[A-Za-z]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
"""Escape sequences of a terminal: colours, movements, titles and links."""

VALUE = (
    r"[+-]?(?:nan|inf(?:inity)?|\d{1,3}(?:,\d{3})+(?:\.\d+)?|"
    r"\d+\.?\d*(?:e[+-]?\d+)?[KMGBT]?|\.\d+(?:e[+-]?\d+)?)|none|null|n/a"
)

GAP = r"\s{0,20}"
"""White space; its length is limited so that no text makes the search slow."""

BETWEEN = (
    rf"""["'\]]?{GAP}(?:[:=]|->|\bis\b|\bof\b)?{GAP}"""
    rf"""["'(]?(?:[A-Za-z][\w.]{{0,30}}\()?{GAP}"""
)
"""What may stand between a name and its number; `tensor(` too."""

AFTER = r"(?![\w%]|\.\w|/\d)"
"""A number with a unit or a percent sign is no norm."""

WORD = r"[A-Za-z_][\w./-]{0,120}"

NAME_END = r"[\w./-]{0,120}(?: (?:of|the|all|total|gradients?|grads?)\b){0,4}"
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
    r"(?:(?P<best>global[_ ]?step|num_updates)|step|iter|iteration|it|batch|update)"
    rf"""["']?{GAP}[:=#]?{GAP}["'\[(]?{GAP}(?P<step>\d+(?:,\d{{3}})*)(?:\.0+)?(?![\d.]\d|[a-z\d%])"""
)
"""A step in a line in lower case; what stands before it is checked apart."""

STEP_FOLDERS = ("train/", "trainer/", "training/")

BAR = re.compile(r"\b(\d+)/(\d+) \[\d")
"""The count of a progress bar, such as "3/40 [00:02<00:25"."""

LEVELS = {"info", "debug", "warning", "train", "trainer"}
"""Words of a logger that may stand directly before a name."""

NEUTRAL = LEVELS | {
    *("the", "a", "an", "and", "with", "of", "at", "has", "its", "current", "this"),
    *("total", "global", "overall", "model", "training", "optimizer", "l2", "step"),
}
"""Words before a name that do not change what it names."""

RECENT_ROWS = 256
"""Number of rows among which a row of the same step is a repetition."""


def read_log_rows(
    lines: Iterable[str], column: str | None = None
) -> Iterator[dict[str, str]]:
    """Yield each name of a gradient norm with its number, and the step.

    Args:
      lines: the lines of the log.
      column: a name to look for, or None for the names of gradient norms.

    >>> list(read_log_rows(["step 7 | loss 2.50 | norm 0.31 | lr 1e-4"]))
    [{'step': '7', 'norm': '0.31'}]
    """
    named = find_named(column) if column else None
    step, bar = None, ProgressBar()
    recent: dict[tuple[str, ...], None] = {}
    for line in lines:
        if "\x1b" in line:
            line = COLOR.sub("", line)
        lower = line.lower()
        step = find_step(lower) or step
        norms = named(line) if named else find_norms(line, lower)
        if not norms:
            continue
        if step is None and (count := BAR.search(line)):
            yield from bar.add(int(count[1]), int(count[2]), norms)
            continue
        yield from bar.flush()
        row = {**({"step": step} if step else {}), **norms}
        key = tuple(row.values())
        if step is None or key not in recent:  # each rank may print the same line
            yield row
            recent[key] = None
            if len(recent) > RECENT_ROWS:
                del recent[next(iter(recent))]
        step = None
    yield from bar.flush()


class ProgressBar:
    """Yields the norms of a progress bar once for each count: the last that it shows.

    A bar is drawn again when it advances, with the norms of the step before. A bar that
    has norms at the count 0 shows those of the last step twice.
    """

    def __init__(self) -> None:
        self._count = -1
        self._norms: dict[str, str] | None = None
        self._last: dict[str, str] | None = None
        self._begins_at_0 = False

    def add(
        self, count: int, total: int, norms: dict[str, str]
    ) -> Iterator[dict[str, str]]:
        """Add a drawing of the bar; yield the norms of the count before."""
        if count != self._count:
            yield from self.flush()
            if count < self._count or self._count < 0:
                self._begins_at_0 = count == 0
            self._count = count
        is_repetition = count == total and self._begins_at_0 and norms == self._last
        self._norms = None if is_repetition else norms

    def flush(self) -> Iterator[dict[str, str]]:
        """Yield the norms of the last count."""
        if self._norms is not None:
            yield self._norms
            self._last = self._norms
        self._norms = None


def find_norms(line: str, lower: str) -> dict[str, str]:
    """Return the numbers of the gradient norms in a line by name.

    Args:
      line: the line.
      lower: the line in lower case.
    """
    norms: dict[str, str] = {}
    word = "norm" if "norm" in lower or "l2" not in lower else "grad"
    place = lower.find(word)
    while place >= 0:
        match = NUMBER_AFTER_NAME.match(line, place)
        if match:
            before = line[max(place - MAX_NAME, 0) : place][::-1]
            start = REVERSED_START.match(before)
            name = find_norm_name((start[0][::-1] if start else "") + match["end"])
            if name:
                norms.setdefault(name, match["value"])
        token = match or TOKEN.match(line, place)
        place = lower.find(word, token.end() if token else place + 1)
    return norms


@lru_cache(maxsize=4096)
def find_norm_name(phrase: str) -> str | None:
    """Return the name of a gradient norm at the end of a phrase, or None.

    >>> find_norm_name("INFO grad norm"), find_norm_name("Train l2_norm/grad/global")
    ('grad norm', 'l2_norm/grad/global')
    >>> find_norm_name("params norm"), find_norm_name("max gradient norm")
    (None, None)
    >>> find_norm_name("the gradient norm"), find_norm_name("post-clip grad norm")
    ('gradient norm', 'post-clip grad norm')
    """
    words = phrase.split()
    name = words.pop()
    if name.startswith("-"):  # an option of a command line
        return None
    while words and not has_both(name):
        if not rank_name(f"grad_norm {words[-1]}") == 0:
            break
        name = f"{words.pop()} {name}"
    is_alone = not words or words[-1].lower() in LEVELS
    if has_both(name) and words and words[-1].lower() not in NEUTRAL:
        name = f"{words[-1]} {name}"  # such as "embedding", "max" or "clipped"
    if rank_name(name) in (None, 4) or not (is_alone or has_both(name)):
        return None
    return name


def has_both(name: str) -> bool:
    """Return whether a name has a word for the gradient and a word for the norm."""
    words = set(split_words(name))
    return bool(words & GRADIENT_WORDS) and bool(words & (NORM_WORDS | {"l2"}))


def find_step(line: str) -> str | None:
    """Return the step that a line states, or None.

    Args:
      line: the line in lower case.

    >>> find_step("[step=10/739328,epoch=0]"), find_step("it took 2.5 s per step")
    ('10', None)
    """
    first = None
    for match in STEP.finditer(line):
        start = match.start()
        before = line[start - 1 : start]
        if before.isalnum() or before in ("_", ".", "-", "/"):
            if not line.endswith(STEP_FOLDERS, 0, start):
                continue
        if match["best"]:
            return match["step"]
        first = first or match["step"]
    return first


def find_named(column: str) -> Callable[[str], dict[str, str]]:
    """Return a function that finds the number behind a given name in a line."""
    pair = re.compile(
        rf"(?<![\w/.]){re.escape(column)}{BETWEEN}(?P<value>{VALUE}){AFTER}",
        re.IGNORECASE,
    )

    def find(line: str) -> dict[str, str]:
        match = pair.search(line)
        return {column: match["value"]} if match else {}

    return find


def list_log_names(lines: Iterable[str], most: int = 20) -> list[str]:
    """Return names that stand before a number in a log, for an error."""
    names: dict[str, None] = {}
    for line in lines:
        for match in PAIR.finditer(COLOR.sub("", line)):
            names[match["name"]] = None
        if len(names) >= most:
            break
    return list(names)[:most]
