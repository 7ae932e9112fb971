"""Define what a policy is; `decision.py` has the one step that every adapter calls.

A policy is a frozen dataclass of plain numbers. It has three pure methods over a vector
of rows: `init`, `limit` and `record`. They are written once, against an array namespace
`xp`, and run in NumPy, in PyTorch, under `jax.jit` and in TensorFlow with XLA. A
namespace must have:

    where minimum maximum isfinite sqrt log exp sum any
    full zeros arange asarray concatenate take take_along_axis    float32 int32

It also supports arithmetic, comparisons, `& | ~` on booleans and basic slicing. A
policy uses nothing else: no branch on data, no write in place, no `float()`.
"""

from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from . import scalars
from .checks import format_error
from .scale import XP, Array, Limit, complete_limit, ignore_overflow

NAMESPACE_NAMES = tuple(
    "where minimum maximum isfinite sqrt log exp sum any full zeros arange asarray "
    "concatenate take take_along_axis float32 int32".split()
)
"""The names that a policy may use from its array namespace."""

State = TypeVar("State")


class NoState(NamedTuple):
    """The state of a policy without a history: it holds nothing."""


class Policy(Protocol):
    """Compute a threshold from past norms; derive from this class to write a policy.

    A policy must be a frozen dataclass (with `repr=False`). Its constructor checks its
    arguments. Its state is a NamedTuple of arrays whose first axis is the rows. Without
    a history it needs only `limit`.

    >>> from dataclasses import dataclass
    >>> from autoclip_core import Fixed, Limit, decide
    >>> @dataclass(frozen=True, repr=False)
    ... class Halving(Fixed):  # a constant threshold, but a spike is cut to half of it
    ...     def limit(self, state, norms=None, *, param_norms=None, xp=np):
    ...         threshold = super().limit(state, norms, xp=xp).threshold
    ...         return Limit(threshold, threshold / 2)
    >>> policy = Halving(2.0)
    >>> _, decision = decide(policy, policy.init(rows=2), [1.0, 4.0])
    >>> decision.scale.tolist()
    [1.0, 0.25]
    """

    @property
    def expected_clip_rate(self) -> float | None:
        """The fraction of steps that are clipped on stationary norms, if known."""
        return None

    @property
    def needs_param_norms(self) -> bool:
        """Whether `limit` needs the norms of the parameters."""
        return False

    @property
    def can_limit_losses(self) -> bool:
        """Whether it works on values of any sign, so that it can be a loss policy."""
        return False

    def init(self, rows: int, xp: XP = np) -> Any:
        """Return the state before the first norm.

        Args:
          rows: the number of rows, >= 0.
          xp: the array namespace.

        Returns:
          A NamedTuple of arrays of shape (rows, ...).

        >>> from autoclip_core import EmaRatio
        >>> EmaRatio(2.0).init(rows=2).count.tolist()
        [0, 0]
        """
        return NoState()

    def limit(
        self, state: Any, norms: Array = None, *, param_norms: Array = None, xp: XP = np
    ) -> Limit:
        """Return the threshold and the target of each row.

        Args:
          state: the result of `init` or `record`.
          norms: the current norms, shape (rows,), 0 for a row without a norm. With None
            the caller asks for a threshold before the norm is known; a policy that
            needs the norm raises a ValueError.
          param_norms: as in `decide`.
          xp: the array namespace.

        Returns:
          A `Limit` of arrays of shape (rows,).

        >>> from autoclip_core import Fixed
        >>> Fixed(2.0).limit(Fixed(2.0).init(rows=2), np.ones(2)).threshold.tolist()
        [2.0, 2.0]
        """

    def record(self, state: Any, norms: Array, limit: Limit, xp: XP = np) -> Any:
        """Return the state with the norms recorded.

        `decide` keeps the old state of rows that record nothing.

        Args:
          state: the result of `init` or `record`.
          norms: the current norms, shape (rows,), finite, 0 for a row without a norm.
          limit: the result of `limit` for these norms.
          xp: the array namespace.

        >>> from autoclip_core import EmaRatio
        >>> policy, norms = EmaRatio(2.0), np.float32([3.0])
        >>> state = policy.init(rows=1)
        >>> policy.record(state, norms, policy.limit(state, norms)).mean.tolist()
        [1.0]
        """
        return state

    def __repr__(self) -> str:
        """Return code that makes an equal policy, and the expected clip rate."""
        rate = self.expected_clip_rate
        comment = "" if rate is None else f"  # clips about {100 * rate:g} % of steps"
        return as_code(self) + comment


def check_policy(value: Any, name: str = "policy") -> None:
    """Raise a TypeError if the value is not a policy, for example a policy class."""
    if isinstance(value, type) or not hasattr(value, "limit"):
        way_out = "write a policy, such as Quantile(0.9)"
        raise TypeError(format_error(name, "a policy", value, way_out))


def set_fields(policy: Policy, **checked: Any) -> None:
    """Store checked arguments in the fields of a policy, which is frozen."""
    for name, value in checked.items():
        object.__setattr__(policy, name, value)


def get_arguments(policy: Policy) -> dict[str, Any]:
    """Return the arguments of the constructor, by name, that make an equal policy.

    An argument that a later version added is left out if it has its default, so that
    saved descriptions stay equal.
    """
    assert is_dataclass(policy)
    pairs = [(f, getattr(policy, f.name)) for f in fields(policy)]
    return {
        f.metadata.get("argument", f.name): value
        for f, value in pairs
        if value != f.default or not f.metadata.get("is_added")
    }


def as_code(value: Any) -> str:
    """Return an expression that evaluates to a policy, or to a number in it."""
    if is_dataclass(value):
        pairs = get_arguments(value).items()  # type: ignore[arg-type]
        inside = (f"{name}={as_code(argument)}" for name, argument in pairs)
        return f"{type(value).__name__}({', '.join(inside)})"
    return "float('inf')" if value == float("inf") else repr(value)


def limit_and_record(
    policy: Policy, state: Any, values: Array, param_norms: Array = None, xp: XP = np
) -> tuple[Limit, Any]:
    """Return the complete limit of a policy, and its state with the values recorded."""
    if xp is scalars:  # a policy receives arrays
        row = scalars.as_row(values)
        limit, recorded = _limit_and_record(policy, state, row, param_norms, np)
        limit = _take_row(limit)
    else:
        limit, recorded = _limit_and_record(policy, state, values, param_norms, xp)
    return complete_limit(limit, xp), recorded


def _limit_and_record(
    policy: Policy, state: Any, values: Array, param_norms: Array, xp: XP
) -> tuple[Limit, Any]:
    if param_norms is not None:
        param_norms = xp.asarray(param_norms, dtype=xp.float32)
    with ignore_overflow(xp):
        limit = policy.limit(state, values, param_norms=param_norms, xp=xp)
        return limit, policy.record(state, values, limit, xp)


def _take_row(limit: Limit) -> Limit:
    """Return the limit of a single row as scalars."""
    threshold, target, inner, cancels, drop = limit
    is_same = target is threshold  # then `complete_limit` has less to do
    threshold, drop = scalars.take_row(threshold), scalars.take_row(drop)
    target = threshold if is_same else scalars.take_row(target)
    return Limit(threshold, target, inner, cancels, drop)


def select_rows(rows: Array, new: Any, old: Any, xp: XP = np) -> Any:
    """Return the new state in the given rows and the old state in all other rows.

    A state may define its own rule, a method `select_rows(rows, old)`.
    """
    if xp is scalars:
        return new if rows else old
    if new is old or (xp is np and rows.all()):
        return new  # in NumPy a copy of every window is worth avoiding
    if hasattr(new, "select_rows"):
        return new.select_rows(rows, old)
    if isinstance(new, tuple):
        pairs = zip(new, old, strict=True)
        return type(new)(*(select_rows(rows, n, o, xp) for n, o in pairs))
    mask = rows[:, None] if len(new.shape) == 2 else rows
    return xp.where(mask, new, old)
