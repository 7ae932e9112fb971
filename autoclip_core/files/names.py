"""Judges the name of a column: step, time, or a gradient norm, and how good a one."""

import re
from functools import lru_cache
from itertools import takewhile

INDEX_WORDS = {
    *("step", "steps", "epoch", "epochs", "time", "timestamp", "runtime", "index"),
    *("iter", "iteration", "batch", "update", "updates", "unnamed"),
}
"""Names of columns that hold the step or the time."""

QUALIFIERS = {
    *("global", "wall", "relative", "process", "train", "trainer", "training", "num"),
    *("run", "opt", "optimizer"),
}
"""Words that may stand before the name of such a column, as in "global step"."""

STEP_NAMES = (
    *("globalstep", "trainerglobalstep", "trainglobalstep", "globalstepmaxsteps"),
    *("step", "steps", "trainstep", "trainingstep", "iteration", "iter"),
    "trainingiteration",
    *("numupdates", "update", "updates", "optimizerstep", "batch", "timebatch"),
    "index",
)
"""Columns that hold the step, best first, as letters only."""

GRADIENT_WORDS = {"grad", "grads", "gradient", "gradients", "gnorm", "gradnorm"}

NORM_WORDS = {"norm", "norms", "gnorm", "gradnorm"}

COMMON_WORDS = {
    *("total", "global", "overall", "all", "full", "model", "l2", "the", "of"),
    *("train", "training", "trainer", "optim", "optimizer", "opt", "stats", "metrics"),
    *("before", "pre", "unclipped", "raw", "preclip", "step", "log", "logs", "debug"),
}
"""Words that a norm of the whole gradient may have in its name."""

AFTER_WORDS = {
    *("after", "post", "clipped", "postclip"),
    *("mean", "avg", "average", "ema", "epoch"),
}
"""Words of a norm after clipping, or of a mean of several steps."""

OTHER_WORDS = {
    *("param", "params", "parameter", "parameters", "weight", "weights", "update"),
    *("updates", "moment", "moments", "momentum", "activation", "activations"),
}
"""Words of norms of something else, unless the name also names the gradient first."""

SETTING_WORDS = {"max", "clip", "clipping", "threshold", "limit", "ratio", "scale"}
"""Words of a setting or a quotient, such as "max_grad_norm"."""

LEVELS = {"info", "debug", "warning", "train", "trainer"}
"""Words of a logger that may stand directly before a name."""

NEUTRAL = LEVELS | {
    *("the", "a", "an", "and", "with", "of", "at", "has", "its", "current", "this"),
    *("total", "global", "overall", "model", "training", "optimizer", "l2", "step"),
}
"""Words before a name that do not change what it names."""

ANY_NAMES = {"value", "values", "arr"}
"""Names that say nothing: the file must then hold norms in its only column."""


def split_words(name: str) -> list[str]:
    """Return the lower-case words of a name; a run's name before " - " is left out.

    >>> split_words("run 3 - train/gradNorm_l2")
    ['train', 'grad', 'norm', 'l2']
    """
    name = re.sub(r"(^|[_/])clip/", r"\1", strip_run(name))
    name = re.sub("(?<=[a-z])(?=[A-Z])", " ", name)
    return re.findall("[a-z]+[0-9]*", name.lower())


def strip_run(name: str) -> str:
    """Return a name without the run that W&B writes before it."""
    return name.rpartition(" - ")[2]


def rank_name(name: str) -> int | None:
    """Return how well a column's name names the norm of the gradient, or None.

    0 is the norm of the whole gradient, 1 a norm with no word about the gradient, 2 the
    norm of a part, 3 a norm after clipping or a mean, 4 a name that says nothing.

    >>> [rank_name(n) for n in ("grad_norm", "norm", "grad_norm/fc.weight", "Value")]
    [0, 1, 2, 4]
    >>> [rank_name(n) for n in ("param_norm", "layernorm_scale", "loss", "max_norm")]
    [None, None, None, None]
    """
    words = split_words(name)
    if {word.rstrip("0123456789") for word in words} <= ANY_NAMES:
        return 4 if words or name.isdecimal() else None
    before = list(takewhile(lambda word: word not in GRADIENT_WORDS, words))
    has_gradient = len(before) < len(words)
    if not has_norm(words) or OTHER_WORDS & set(before):
        return None
    words = [word if word == "l2" else word.rstrip("0123456789") for word in words]
    extra = set(words) - GRADIENT_WORDS - NORM_WORDS - COMMON_WORDS
    if extra & AFTER_WORDS and extra <= AFTER_WORDS | {"clip", "clipping"}:
        return 3
    if {"before", "pre"} & set(words):
        extra -= {"clip", "clipping"}
    if extra & SETTING_WORDS:
        return None
    if has_gradient:
        return 2 if extra else 0
    return None if extra else 1


def has_norm(words: list[str]) -> bool:
    """Return whether the words name a norm."""
    has_l2 = "l2" in words and not GRADIENT_WORDS.isdisjoint(words)
    return has_l2 or not NORM_WORDS.isdisjoint(words)


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


def is_loss(name: str) -> bool:
    """Return whether a column holds the training loss of each step.

    >>> [is_loss(n) for n in ("loss", "train/loss_step", "val_loss", "loss_scale")]
    [True, True, False, False]
    """
    words = set(split_words(name))
    return "loss" in words and words <= COMMON_WORDS | {"loss"}


def has_both(name: str) -> bool:
    """Return whether a name has a word for the gradient and a word for the norm."""
    words = set(split_words(name))
    return bool(words & GRADIENT_WORDS) and bool(words & (NORM_WORDS | {"l2"}))


def is_index(name: str) -> bool:
    """Return whether a column holds the step, the epoch or the time.

    >>> [is_index(n) for n in ("Wall time", "_step", "run - _step", "step_norm", "")]
    [True, True, True, False, True]
    """
    name = re.sub(r"__(MIN|MAX)$|\(.*\)", "", strip_run(name))
    words = set(re.findall("[a-z]+", name.lower()))
    if not words:
        return not name.strip()
    return bool(words & INDEX_WORDS) and words <= INDEX_WORDS | QUALIFIERS


@lru_cache(maxsize=256)
def find_step_name(names: tuple[str, ...]) -> str | None:
    """Return the column that holds the step, or None.

    >>> find_step_name(("epoch", "loss", "run - _step"))
    'run - _step'
    """
    places: dict[int, str] = {}
    for name in names:
        letters = "".join(re.findall("[a-z]+", strip_run(name).lower()))
        if letters in STEP_NAMES:
            places.setdefault(STEP_NAMES.index(letters), name)
    return places[min(places)] if places else None


def make_printable(text: str) -> str:
    r"""Return a text with escapes in place of characters that a terminal executes.

    >>> make_printable("a\x1b[31mb")
    'a\\x1b[31mb'
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
