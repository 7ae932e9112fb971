"""Check arguments; an error names the argument, the rule, the value and a way out."""

import numbers
import operator
from collections.abc import Callable, Iterable

import numpy as np


def check_number(
    name: str,
    value: object,
    rule: str,
    is_valid: Callable[[float], bool],
    way_out: str = "",
) -> float:
    """Return `value` as a float, or raise an error that explains the rule.

    Args:
      name: the name of the argument.
      value: the value of the argument.
      rule: the rule in words; it completes "must be ...".
      is_valid: the rule as a function. Use comparisons: they are False for NaN, so NaN
        is invalid.
      way_out: what to write instead; "" if the rule says enough.

    Raises:
      TypeError: `value` is not a real number. A bool does not count as a number.
      ValueError: `value` breaks the rule.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _type_error(name, f"a number {rule}", value, way_out)
    number = float(value)
    if not is_valid(number):
        raise ValueError(format_error(name, rule, value, way_out))
    return number


def check_positive(name: str, value: object, way_out: str = "") -> float:
    """Return the value as a float if it is a finite number above 0."""
    return check_number(
        name, value, "> 0 and finite", lambda x: 0 < x < float("inf"), way_out
    )


def check_limit(name: str, value: object, way_out: str = "") -> float:
    """Return the value as a float if it is above 0; infinity means no limit."""
    return check_number(name, value, "> 0", lambda x: x > 0, way_out)


def check_quantile(name: str, value: object) -> float:
    """Return the value as a float if it is in [0, 1]; a percentile gets a hint."""
    number = float(value) if isinstance(value, numbers.Real) else 0.0
    hint = f"did you mean {number / 100:g}?" if 1 < number <= 100 else ""
    return check_number(name, value, "in [0, 1]", lambda x: 0 <= x <= 1, hint)


def check_count(name: str, value: object, minimum: int, way_out: str = "") -> int:
    """Return the value as an int if it is a whole number, at least `minimum`."""
    rule = f"a whole number >= {minimum}"
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise _type_error(name, rule, value, way_out) from None
    if count < minimum:
        raise ValueError(format_error(name, rule, value, way_out))
    return count


def check_flag(name: str, value: object) -> bool:
    """Return the value if it is True or False; 0 and 1 are refused."""
    if not isinstance(value, bool):
        raise TypeError(format_error(name, "True or False", value, ""))
    return value


def check_choice(
    name: str, value: object, choices: Iterable[str], way_out: str = ""
) -> str:
    """Return the value if it is one of the `choices`; errors end with `way_out`."""
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        rule = "one of " + ", ".join(repr(choice) for choice in choices)
        raise ValueError(format_error(name, rule, value, way_out))
    return value


def _type_error(name: str, rule: str, value: object, way_out: str) -> TypeError:
    """Return the error for a value of a wrong type, such as an array of a framework."""
    if hasattr(value, "dtype") and not isinstance(value, np.ndarray | np.generic):
        way_out = (
            "a setting is a Python number: call float() or int() outside of traced "
            "code; for a threshold that changes with the step, use Scheduled"
        )
    return TypeError(format_error(name, rule, value, way_out))


def format_error(name: str, rule: str, value: object, way_out: str) -> str:
    """Return an error text: the argument, the rule, the value and the way out.

    The value is shown in one line of at most 80 characters.
    """
    # A torch module, for example, has a line per layer in its repr.
    shown = " ".join(line.strip() for line in repr(value).splitlines())
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"{name} must be {rule}, got {shown}" + (f"; {way_out}" if way_out else "")
