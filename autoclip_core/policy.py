"""What a policy is, and `decide()`: the one step that every adapter calls.

A policy is a frozen dataclass of plain numbers with three pure methods over a vector of
rows. They are written once, against an array namespace `xp`, and run in NumPy, in
PyTorch, under `jax.jit` and in TensorFlow with XLA. A namespace must have:

    where minimum maximum isfinite sqrt log exp sum any
    full zeros arange asarray concatenate take take_along_axis    float32 int32

beside arithmetic, comparisons, `& | ~` on booleans and basic slicing. A policy uses
nothing else: no branch on data, no write in place, no `float()`.
"""

from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from .checks import check_choice, format_error
from .history.full import History, widen
from .scale import NONFINITE, Array, as_norms, scale_rows

NAMESPACE_NAMES = tuple(
    "where minimum maximum isfinite sqrt log exp sum any full zeros arange asarray "
    "concatenate take take_along_axis float32 int32".split()
)
"""The names a policy may use of its array namespace."""

State = TypeVar("State")


class Limit(NamedTuple):
    """What a policy allows: rows above the threshold are scaled to the target."""

    threshold: Array
    """T, shape (rows,): norms up to here are left alone; +inf where there is none."""
    target: Array
    """R <= T, shape (rows,): the norm of a row after it was clipped."""
    inner: "Limit | None" = None
    """The limit of the policy inside a combinator: what that policy records against."""
    cancels: bool = False
    """A row above its threshold whose target is 0 cancels the whole update."""


class Decision(NamedTuple):
    """What happened in one step; every field has one entry per row."""

    norm: Array
    """The norm before scaling; NaN where the row was not observed."""
    threshold: Array
    """T, the norm above which the row is clipped; +inf where there is none yet."""
    scale: Array
    """The factor for the row's gradient: 1 leaves it alone, 0 removes it."""
    clipped: Array
    """Whether the finite norm exceeded the threshold."""
    finite: Array
    """False where the observed norm is NaN or infinite."""
    skipped: Array
    """Whether the whole update is to be cancelled; the same in every row."""


class Policy(Protocol):
    """How a threshold follows from what was seen; derive from it to write your own.

    A policy must be a frozen dataclass (with `repr=False`), its constructor checks its
    arguments, and its state is a NamedTuple of arrays whose first axis is the rows.

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
        """The fraction of steps this policy clips on stationary norms, if known."""
        return None

    @property
    def needs_param_norms(self) -> bool:
        """Whether `limit` needs the norms of the parameters."""
        return False

    def init(self, rows: int, xp: Any = np) -> Any:
        """Return the state that has seen nothing.

        Args:
          rows: how many rows it is for, >= 0.
          xp: the array namespace.

        Returns:
          A NamedTuple of arrays of shape (rows, ...).

        >>> from autoclip_core import EmaRatio
        >>> EmaRatio(2.0).init(rows=2).count.tolist()
        [0, 0]
        """
        ...

    def limit(
        self,
        state: Any,
        norms: Array = None,
        *,
        param_norms: Array = None,
        xp: Any = np,
    ) -> Limit:
        """Return the threshold and the target of each row.

        Args:
          state: what `init` or `record` returned.
          norms: the current norms, shape (rows,), 0 where a row has none. None asks for
            a threshold before the norm is known; a policy that cannot say raises a
            ValueError.
          param_norms: norms of the parameters, shape (rows,), if the policy needs them.
          xp: the array namespace.

        Returns:
          A `Limit` of arrays of shape (rows,).

        >>> from autoclip_core import Fixed
        >>> Fixed(2.0).limit(Fixed(2.0).init(rows=2), np.ones(2)).threshold.tolist()
        [2.0, 2.0]
        """
        ...

    def record(self, state: Any, norms: Array, limit: Limit, xp: Any = np) -> Any:
        """Return the state that has learned the norms; `decide` says for which rows.

        Args:
          state: what `init` or `record` returned.
          norms: the current norms, shape (rows,), finite, 0 where a row has none.
          limit: what `limit` returned for them.
          xp: the array namespace.

        >>> from autoclip_core import EmaRatio
        >>> policy, norms = EmaRatio(2.0), np.float32([3.0])
        >>> state = policy.init(rows=1)
        >>> policy.record(state, norms, policy.limit(state, norms)).mean.tolist()
        [1.0]
        """
        ...

    def __repr__(self) -> str:
        """Return code that makes this policy again, and what it is expected to do."""
        rate = self.expected_clip_rate
        comment = "" if rate is None else f"  # clips about {100 * rate:g} % of steps"
        return as_code(self) + comment


def check_policy(value: Any) -> None:
    """Refuse what is not a policy, such as a policy's class."""
    if isinstance(value, type) or not hasattr(value, "limit"):
        way_out = "write a policy, such as Quantile(0.9)"
        raise TypeError(format_error("policy", "a policy", value, way_out))


def get_arguments(policy: Policy) -> dict[str, Any]:
    """Return the constructor's arguments, by name, that make this policy again."""
    assert is_dataclass(policy)
    return {
        f.metadata.get("argument", f.name): getattr(policy, f.name)
        for f in fields(policy)
    }


def as_code(value: Any) -> str:
    """Return the expression that evaluates to a policy or to a number in it."""
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
    xp: Any = np,
) -> tuple[State, Decision]:
    """Take one step: limit, scale, record, under the numeric rules of `scale.py`.

    The threshold is taken before the norm is recorded (unless the policy includes the
    current norm). Only finite, positive norms of observed rows are recorded; a policy
    cannot forget this rule, because it is applied here, to all of them.

    Args:
      policy: any `Policy`.
      state: its state, from `policy.init(rows)` or from the previous step.
      norms: the norm of each row, shape (rows,), any float type.
      observed: which rows have a gradient, booleans of shape (rows,); None means all.
      param_norms: norms of the parameters of the same rows, if the policy needs them.
      nonfinite: what becomes of a row whose norm is NaN or infinite: "zero" (scale 0),
        "skip" (every scale 0 and no row learns), "propagate" (scale 1), "raise".
      xp: the array namespace; `state` and `norms` belong to it.

    Returns:
      The next state and the `Decision`.

    Raises:
      FloatingPointError: a norm is not finite and `nonfinite="raise"`.
      ValueError: `nonfinite` is not one of the four words.

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
    seen = finite | ~finite if observed is None else xp.asarray(observed)
    _check_shapes(norms, observed=seen, param_norms=param_norms)
    bad = seen & ~finite
    if nonfinite == "raise" and bool(xp.any(bad)):
        raise FloatingPointError(
            'a gradient norm is not finite and nonfinite="raise"; '
            'to go on without that gradient, set nonfinite="zero" or "skip"'
        )
    # No policy ever meets a NaN, an infinity or a row without a gradient: it meets 0.
    known = xp.where(seen & finite, norms, 0.0)
    if param_norms is not None:
        param_norms = xp.asarray(param_norms, dtype=xp.float32)
    # Beyond the range of float32 a threshold is +inf, and NumPy need not say so.
    with np.errstate(over="ignore") if xp is np else nullcontext():
        limit = policy.limit(state, known, param_norms=param_norms, xp=xp)
        learned = policy.record(state, known, limit, xp)
    scale, clipped = scale_rows(known, limit.threshold, limit.target, xp)

    learns = known > 0
    skipped = seen & ~seen
    if limit.cancels:
        skipped = skipped | xp.any(clipped & (limit.target <= 0))
    if nonfinite == "skip":
        skipped = skipped | xp.any(bad)
        learns = learns & ~xp.any(bad)
    if nonfinite == "zero":
        scale = xp.where(bad, 0.0, scale)
    state = select_rows(learns, learned, state, xp)
    return state, Decision(
        norm=xp.where(seen, norms, float("nan")),
        threshold=limit.threshold,
        scale=xp.where(skipped & seen, 0.0, scale),
        clipped=clipped,
        finite=~bad,
        skipped=skipped,
    )


def _check_shapes(norms: Array, **others: Array) -> None:
    """Refuse arrays that do not have one entry per row; shapes are known in a trace."""
    rows = tuple(norms.shape)
    if len(rows) != 1:
        raise ValueError(
            format_error("norms", "of shape (rows,)", rows, "one norm per row")
        )
    for name, array in others.items():
        shape = rows if array is None else np.shape(array)
        if tuple(shape) != rows:
            way_out = "it has one entry per row, as norms has"
            raise ValueError(
                format_error(name, f"of shape {rows}", tuple(shape), way_out)
            )


def select_rows(rows: Array, new: Any, old: Any, xp: Any = np) -> Any:
    """Return the new state in the given rows and the old one in the others."""
    if new is old or (xp is np and rows.all()):
        return new  # on the host a copy of every window is worth avoiding
    if isinstance(new, History):  # it merges all rows at once, also those that are idle
        rows = rows | (new.count == old.count)
    if isinstance(new, tuple):
        return type(new)(
            *(select_rows(rows, n, o, xp) for n, o in zip(new, old, strict=True))
        )
    mask = rows[:, None] if len(new.shape) == 2 else rows
    return xp.where(mask, widen(new, old), widen(old, new))
