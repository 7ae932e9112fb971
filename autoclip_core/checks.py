"""What a constructor accepts: checks that name argument, rule, value and way out."""

import numbers
import operator
from collections.abc import Callable, Iterable


def check_number(
    name: str,
    value: object,
    rule: str,
    holds: Callable[[float], bool],
    way_out: str = "",
) -> float:
    """Return `value` as a float, or raise an error that says what is wrong.

    Args:
      name: the argument's name, as the caller wrote it.
      value: what the caller gave.
      rule: the rule in words; it completes "must be ...".
      holds: the rule as a function; NaN fails because every comparison with it does.
      way_out: what to write instead, if there is something to say.

    Raises:
      TypeError: `value` is not a real number (a bool is not one).
      ValueError: the rule does not hold.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(format_error(name, f"a number {rule}", value, way_out))
    number = float(value)
    if not holds(number):
        raise ValueError(format_error(name, rule, value, way_out))
    return number


def check_positive(name: str, value: object, way_out: str = "") -> float:
    """Return a finite number above 0."""
    return check_number(
        name, value, "> 0 and finite", lambda x: 0 < x < float("inf"), way_out
    )


def check_limit(name: str, value: object, way_out: str = "") -> float:
    """Return a number above 0; infinity means that nothing is limited."""
    return check_number(name, value, "> 0", lambda x: x > 0, way_out)


def check_quantile(name: str, value: object) -> float:
    """Return a number in [0, 1]; a percentile gets a hint."""
    number = float(value) if isinstance(value, numbers.Real) else 0.0
    hint = f"did you mean {number / 100:g}?" if 1 < number <= 100 else ""
    return check_number(name, value, "in [0, 1]", lambda x: 0 <= x <= 1, hint)


def check_count(name: str, value: object, least: int, way_out: str = "") -> int:
    """Return a whole number of at least `least`."""
    rule = f"a whole number >= {least}"
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(format_error(name, rule, value, way_out)) from None
    if count < least:
        raise ValueError(format_error(name, rule, value, way_out))
    return count


def check_flag(name: str, value: object) -> bool:
    """Return True or False, and nothing that merely looks like it."""
    if not isinstance(value, bool):
        raise TypeError(format_error(name, "True or False", value, ""))
    return value


def check_choice(name: str, value: object, choices: Iterable[str]) -> str:
    """Return one of the `choices`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        rule = "one of " + ", ".join(repr(choice) for choice in choices)
        raise ValueError(format_error(name, rule, value, ""))
    return value


def format_error(name: str, rule: str, value: object, way_out: str) -> str:
    """Say which argument broke which rule, with what value, and what to do."""
    return f"{name} must be {rule}, got {value!r}" + (f"; {way_out}" if way_out else "")
