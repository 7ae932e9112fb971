"""Define what a policy is, and `decide()`: the one step that every adapter calls.

A policy is a frozen dataclass of plain numbers. It has three pure methods over a vector
of rows: `init`, `limit` and `record`. They are written once, against an array namespace
`xp`, and run in NumPy, in PyTorch, under `jax.jit` and in TensorFlow with XLA. A
namespace must have:

    where minimum maximum isfinite sqrt log exp sum any
    full zeros arange asarray concatenate take take_along_axis    float32 int32

It also supports arithmetic, comparisons, `& | ~` on booleans and basic slicing. A
policy uses nothing else: no branch on data, no write in place, no `float()`.
"""

from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from .checks import check_choice, format_error
from .scale import (
    NONFINITE,
    XP,
    Array,
    as_norms,
    complete_limit,
    find_level,
    scale_rows,
)
from .scale import Limit as Limit

NAMESPACE_NAMES = tuple(
    "where minimum maximum isfinite sqrt log exp sum any full zeros arange asarray "
    "concatenate take take_along_axis float32 int32".split()
)
"""The names that a policy may use from its array namespace."""

State = TypeVar("State")


class Decision(NamedTuple):
    """The result of one step; every field has one entry per row."""

    norm: Array
    """The norm before scaling; NaN if the row was not observed."""
    threshold: Array
    """min(T, D), the norm above which the row is changed; +inf without a limit."""
    scale: Array
    """The factor for the gradient of the row: 1 keeps it, 0 removes it. In a clipper
    with `scale_only`, the norm after scaling divided by the norm before."""
    clipped: Array
    """Whether the norm is finite and exceeds the threshold; a dropped row, too."""
    finite: Array
    """False if the observed norm is NaN or infinite."""
    skipped: Array
    """Whether the whole update must be skipped; the same in every row."""
    dropped: Array
    """Whether the norm is finite and exceeds the drop level D."""


class Policy(Protocol):
    """Compute a threshold from past norms; derive from this class to write a policy.

    A policy must be a frozen dataclass (with `repr=False`). Its constructor checks its
    arguments. Its state is a NamedTuple of arrays whose first axis is the rows.

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


def get_arguments(policy: Policy) -> dict[str, Any]:
    """Return the arguments of the constructor, by name, that make an equal policy.

    An optional policy that is None is left out, so that saved descriptions stay equal.
    """
    assert is_dataclass(policy)
    pairs = [(f, getattr(policy, f.name)) for f in fields(policy)]
    return {
        f.metadata.get("argument", f.name): value
        for f, value in pairs
        if value is not None or "is_optional" not in f.metadata
    }


def as_code(value: Any) -> str:
    """Return an expression that evaluates to a policy, or to a number in it."""
    if is_dataclass(value):
        pairs = get_arguments(value).items()  # type: ignore[arg-type]
        inside = (f"{name}={as_code(argument)}" for name, argument in pairs)
        return f"{type(value).__name__}({', '.join(inside)})"
    return "float('inf')" if value == float("inf") else repr(value)


def decide(
    policy: Policy,
    state: State,
    norms: Array,
    *,
    observed: Array = None,
    param_norms: Array = None,
    nonfinite: str = "zero",
    xp: XP = np,
) -> tuple[State, Decision]:
    """Take one step: limit, scale, record, with the numeric rules of `scale.py`.

    The policy sets the threshold before it records the norm, unless it includes the
    current norm. Only finite, positive norms of observed rows are recorded. This
    function applies that rule to every policy, so a policy need not check it.

    Args:
      policy: any `Policy`.
      state: the state of the policy, from `policy.init(rows)` or from the last step.
      norms: the norm of each row, shape (rows,), any float type.
      observed: which rows have a gradient, booleans of shape (rows,); None means all.
      param_norms: norms of the parameters, shape (rows,), if the policy needs them.
      nonfinite: the rule for a row whose norm is NaN or infinite: "zero" (scale 0),
        "skip" (every scale is 0 and no row records), "propagate" (scale 1), "raise".
      xp: the array namespace; `state` and `norms` belong to it.

    Returns:
      The next state and the `Decision`.

    Raises:
      FloatingPointError: a norm is not finite and `nonfinite="raise"`.
      ValueError: `nonfinite` is another word, or a shape is not (rows,).

    >>> from autoclip_core import Quantile
    >>> policy = Quantile(0.5, history_length=3)
    >>> state = policy.init(rows=1)
    >>> for norm in [1.0, 3.0, float("nan"), 8.0]:
    ...     state, decision = decide(policy, state, [norm])
    ...     print(decision.threshold[0], decision.scale[0])
    inf 1.0
    1.0 0.33333334
    2.0 0.0
    2.0 0.25
    """
    check_choice("nonfinite", nonfinite, NONFINITE)
    norms = as_norms(norms, xp)
    finite = xp.isfinite(norms)
    is_observed = finite | ~finite if observed is None else xp.asarray(observed)
    _check_shapes(norms, observed=is_observed, param_norms=param_norms)
    is_nonfinite = is_observed & ~finite
    if nonfinite == "raise" and bool(xp.any(is_nonfinite)):
        raise FloatingPointError(
            'a gradient norm is not finite and nonfinite="raise"; '
            'to continue without that gradient, set nonfinite="zero" or "skip"'
        )
    # A policy receives 0 instead of NaN, infinity and a row without a gradient.
    valid_norms = xp.where(is_observed & finite, norms, 0.0)
    if param_norms is not None:
        param_norms = xp.asarray(param_norms, dtype=xp.float32)
    # A threshold beyond the range of float32 is +inf; NumPy need not warn about it.
    with np.errstate(over="ignore") if xp is np else nullcontext():
        limit = policy.limit(state, valid_norms, param_norms=param_norms, xp=xp)
        recorded = policy.record(state, valid_norms, limit, xp)
    limit = complete_limit(limit, xp)
    scale, clipped, dropped = scale_rows(
        valid_norms, limit.threshold, limit.target, limit.drop, xp
    )

    records = valid_norms > 0
    skipped = is_observed & ~is_observed
    if limit.cancels:
        skipped = skipped | xp.any(dropped)
    if nonfinite == "skip":
        skipped = skipped | xp.any(is_nonfinite)
        records = records & ~xp.any(is_nonfinite)
    if nonfinite == "zero":
        scale = xp.where(is_nonfinite, 0.0, scale)
    state = select_rows(records, recorded, state, xp)
    return state, Decision(
        norm=xp.where(is_observed, norms, float("nan")),
        threshold=find_level(limit, xp),
        scale=xp.where(skipped & is_observed, 0.0, scale),
        clipped=clipped,
        finite=~is_nonfinite,
        skipped=skipped,
        dropped=dropped,
    )


def _check_shapes(norms: Array, **others: Array) -> None:
    """Raise a ValueError unless every array has shape (rows,); a trace knows shapes."""
    rows = tuple(norms.shape)
    if len(rows) != 1:
        rule, way_out = "of shape (rows,)", "one norm per row"
        raise ValueError(format_error("norms", rule, rows, way_out))
    for name, array in others.items():
        shape = rows if array is None else tuple(np.shape(array))
        if shape != rows:
            rule, way_out = f"of shape {rows}", "give one entry per row, as in norms"
            raise ValueError(format_error(name, rule, shape, way_out))


def select_rows(rows: Array, new: Any, old: Any, xp: XP = np) -> Any:
    """Return the new state in the given rows and the old state in all other rows.

    A state may define its own rule, a method `select_rows(rows, old)`.
    """
    if new is old or (xp is np and rows.all()):
        return new  # in NumPy a copy of every window is worth avoiding
    if hasattr(new, "select_rows"):
        return new.select_rows(rows, old)
    if isinstance(new, tuple):
        pairs = zip(new, old, strict=True)
        return type(new)(*(select_rows(rows, n, o, xp) for n, o in pairs))
    mask = rows[:, None] if len(new.shape) == 2 else rows
    return xp.where(mask, new, old)
