"""`Clipper`: a gradient transformer, from (gradient, variable) pairs to pairs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

import autoclip_core
from autoclip_core import Decision, Policy, decide
from autoclip_core.checks import format_error
from autoclip_core.clipper.metrics import (
    compute_metrics,
    compute_row_metrics,
    count_step,
)
from autoclip_core.clipper.patterns import Pattern, as_patterns
from autoclip_core.clipper.serialize import policy_from_dict, policy_to_dict
from autoclip_core.policy import check_policy

from . import namespace
from .gradients import Part, has_norm, row_norms, scale_all
from .layouts import UnitsOf, units_by
from .memory import Make, Memory, Store, check_memory, nothing_seen, own_variable
from .rows import Rows
from .settings import Settings, exclude_from_config
from .tracked import Tracked

Pair = tuple[Any, Any]
"""A gradient, or None, and its variable."""


@keras.saving.register_keras_serializable("autoclip_tf")
class Clipper(Tracked):  # type: ignore[misc]
    """Clip gradients by any policy, at any scope, inside a Keras optimizer.

    It is a callable from a list of (gradient, variable) pairs to such a list: for the
    `gradient_transformers` of `autoclip_tf.optimizers`, of `tf_keras.optimizers.legacy`
    and for a loop of your own. It runs eagerly, in graphs and under XLA.

    Args:
      policy: any policy of `autoclip_core`.
      scope: the gradients that share one norm: each "parameter" (the default), all of
        them ("global"), or each output "unit" of each variable.
      global_clipping: the older spelling of `scope="global"`.
      nonfinite: what becomes of a row whose norm is NaN or infinite: "zero" sets its
        gradient to 0, "propagate" leaves it as it came. It is never recorded.
      warmup_steps: norms that each row records before the policy takes over, >= 0.
      warmup_threshold: the threshold until then, > 0; by default nothing is clipped.
      min_threshold: the threshold is never below this, > 0.
      max_threshold: the threshold is never above this, > 0, the warm-up included.
      exclude: variables to leave out: names of layers or variables, ends of paths,
        patterns with `*`, compiled regular expressions, functions of (path, variable).
      dry_run: observe, decide and learn, but change no gradient.

    Raises:
      ValueError, TypeError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import Fixed
    >>> weight = keras.Variable([0.0, 0.0])
    >>> clip = Clipper(Fixed(1.0))
    >>> [(gradient, _)] = clip([(ops.convert_to_tensor([3.0, 4.0]), weight)])
    >>> ops.convert_to_numpy(gradient), clip.decision.norm
    (array([0.6, 0.8], dtype=float32), array([5.], dtype=float32))
    """

    _default_scope = "parameter"

    def __init__(
        self,
        policy: Policy,
        *,
        scope: str | None = None,
        global_clipping: bool | None = None,
        nonfinite: str = "zero",
        warmup_steps: int = 0,
        warmup_threshold: float | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
        exclude: Pattern | Iterable[Pattern] | None = None,
        dry_run: bool = False,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        check_policy(policy)
        self.policy = policy
        self._settings = Settings(
            scope,
            global_clipping,
            nonfinite,
            warmup_steps,
            warmup_threshold,
            min_threshold,
            max_threshold,
            exclude,
            dry_run,
        )
        self.scope = self._settings.scope_or(self._default_scope)
        as_patterns(exclude)
        self._limits = self._settings.around(policy)
        _check_fits_a_graph(self._limits)
        self._rows: Rows | None = None

    @property
    def built(self) -> bool:
        """Whether it knows its variables."""
        return self._rows is not None

    @property
    def names(self) -> list[str]:
        """What each row is, in the order of a decision's entries."""
        return list(self._built().names)

    @property
    def decision(self) -> Decision:
        """The last decision, in NumPy, one entry per row (see `names`)."""
        return self._on_host().decision

    def build(self, variables: Sequence[Any], make: Make = own_variable) -> None:
        """Lay out the rows and make the variables of the memory.

        An optimizer of `autoclip_tf.optimizers` calls it, and so does the first step
        of a loop that has none. Call it before that where a variable may be without a
        gradient in the first step.

        Args:
          variables: all the variables that may come.
          make: from a name and an initial value to a variable of the memory.

        Raises:
          ValueError: it is built already, for another optimizer; or `exclude` does not
            fit the variables.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> clip.build([weight])
        >>> len(clip.names), clip.metrics()["clip/steps"]
        (1, 0.0)
        """
        if self.built:
            raise ValueError(
                f"a clipper must belong to one optimizer, got a {type(self).__name__} "
                "that another one uses, whose history it holds; make a second clipper "
                f"with {type(self).__name__}.from_config(clipper.get_config())"
            )
        patterns = as_patterns(self._settings.exclude)
        rows = Rows(variables, self.scope, self._units(), patterns)
        fresh = nothing_seen(self._limits, len(rows.names))
        self._rows, self._store = rows, Store(fresh, make)
        self._variables = self._store.variables  # where a checkpoint looks for them

    def __call__(self, grads_and_vars: Iterable[Pair]) -> list[Pair]:
        """Take one step: measure, decide, learn, and return the pairs scaled.

        Args:
          grads_and_vars: pairs of a gradient (dense, `tf.IndexedSlices`, or None) and
            its variable.

        Returns:
          The pairs in the same order; a gradient within its limit keeps its bits.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> [(gradient, _)] = clip([(ops.convert_to_tensor([4.0]), weight)])
        >>> ops.convert_to_numpy(gradient).tolist()
        [2.0]
        """
        pairs = list(grads_and_vars)
        if not self.built:
            self.build([variable for _, variable in pairs])
        rows = self._built()
        slots = [rows.of(variable) for _, variable in pairs]
        parts = {
            place: Part(slot, gradient, tuple(variable.shape))
            for place, ((gradient, variable), slot) in enumerate(
                zip(pairs, slots, strict=True)
            )
            if slot is not None and gradient is not None
        }
        scaled = self._step(list(parts.values()), len(rows.names))
        for place, gradient in zip(parts, scaled, strict=True):
            pairs[place] = (gradient, pairs[place][1])
        return pairs

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return what to log of the last step and of the run.

        Args:
          per_row: whether to add norm, threshold, scale and clip rate of every row, as
            `clip/norm/<path>` and so on.

        Returns:
          The names of `autoclip_core.clipper.metrics.compute_metrics`, each a float.

        Raises:
          ValueError: it has not met its variables yet.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> pairs = clip([(ops.convert_to_tensor([4.0]), weight)])
        >>> clip.metrics()["clip/norm"], clip.metrics()["clip/norm_after"]
        (4.0, 2.0)
        """
        seen = self._on_host()
        found = {
            name: float(value)
            for name, value in compute_metrics(seen.decision, seen.tally).items()
        }
        if per_row:
            found |= compute_row_metrics(self.names, seen.decision, seen.tally)
        return found

    def check_state(self) -> None:
        """Raise if its memory is broken: NaN, a negative level, impossible counts.

        Call it once after `tf.train.Checkpoint.restore`, which writes into variables
        and asks nobody. `load_weights` and `load_model` look before they write.

        Raises:
          ValueError: it is; the message says where and how. Or it has not met its
            variables yet.

        >>> from autoclip_core import Fixed
        >>> clip = Clipper(Fixed(1.0))
        >>> clip.build([keras.Variable([0.0, 0.0])])
        >>> clip.check_state()
        """
        check_memory(self._on_host())

    def reset(self) -> None:
        """Forget every norm and count.

        Raises:
          ValueError: it has not met its variables yet.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> pairs = clip([(ops.convert_to_tensor([4.0]), weight)])
        >>> clip.reset()
        >>> clip.metrics()["clip/steps"]
        0.0
        """
        self._built()
        self._store.reset()

    def as_optimizer(self, optimizer: Any) -> Any:
        """Return a Keras optimizer of the same settings that clips by this first.

        Args:
          optimizer: a Keras 3 optimizer that has not met its variables yet.

        Raises:
          ValueError: it has, or it wraps another optimizer.
          TypeError: it is no Keras optimizer.

        >>> from autoclip_tf import QuantileClip
        >>> adam = QuantileClip(quantile=0.9).as_optimizer(keras.optimizers.AdamW(1e-3))
        >>> type(adam).__name__, adam.gradient_transformers[0].policy.quantile
        ('AdamW', 0.9)
        """
        from .optimizers import rebuilt  # it imports this module

        return rebuilt(optimizer, [self])

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this clipper again, ready to be saved.

        >>> from autoclip_tf import QuantileClip
        >>> config = QuantileClip(0.5, scope="global").get_config()
        >>> config["quantile"], config["scope"]
        (0.5, 'global')
        """
        arguments = {
            name: policy_to_dict(value) if value is self.policy else value
            for name, value in self._arguments().items()
        }
        return {**arguments, **self._settings.config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Clipper":
        """Return the clipper that `get_config` described, without its history.

        Args:
          config: what `get_config` returned.

        Raises:
          TypeError, ValueError: an argument breaks its rule; the message says which.

        >>> from autoclip_tf import NormClip
        >>> NormClip.from_config(NormClip(2.0).get_config())
        NormClip(max_norm=2.0)
        """
        given = dict(config)
        given["exclude"] = exclude_from_config(given.get("exclude"))
        if isinstance(given.get("policy"), Mapping):
            given["policy"] = policy_from_dict(given["policy"], _find_policy)
        return cls(**given)

    def __repr__(self) -> str:
        """Return code that makes this clipper again."""
        given = {**self._arguments(), **self._settings.given()}
        inside = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return f"{type(self).__name__}({inside})"

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments beside the common ones."""
        return {"policy": self.policy}

    def _units(self) -> UnitsOf:
        """Return how a variable is cut at scope "unit"."""
        return units_by("unit", {})

    def _step(self, parts: list[Part], rows: int) -> list[Any]:
        """Decide and learn; return what becomes of the gradients."""
        seen = self._store.read()
        state, decision = decide(
            self._limits,
            seen.policy,
            row_norms(parts, rows),
            observed=ops.convert_to_tensor(has_norm(parts, rows)),
            param_norms=self._param_norms(),
            nonfinite=self._settings.nonfinite,
            xp=namespace,
        )
        self._remember(decision, seen.tally, state)
        if self._settings.dry_run or not parts:
            return [part.tensor for part in parts]
        return scale_all(parts, decision.scale)

    def _remember(self, decision: Decision, tally: Any, state: Any) -> None:
        counted = count_step(tally, decision, namespace)
        self._store.write(Memory(decision, counted, state))

    def _param_norms(self) -> Any:
        if not self._limits.needs_param_norms:
            return None
        rows = self._built()
        parts = [
            Part(slot, ops.convert_to_tensor(variable), tuple(variable.shape))
            for variable, slot in rows.members()
        ]
        return row_norms(parts, len(rows.names))

    def _on_host(self) -> Memory:
        self._built()
        return self._store.on_host()

    def _built(self) -> Rows:
        if self._rows is None:
            raise ValueError(
                "a clipper must have met its variables before it can be asked, got one "
                "that has not; take a step, or call build(model.trainable_variables)"
            )
        return self._rows


def _find_policy(name: str) -> Any | None:
    """Return a policy's type: one of the core, or one that Keras was told of."""
    kind = getattr(autoclip_core, name, None)
    return keras.saving.get_registered_object(name) if kind is None else kind


def _check_fits_a_graph(policy: Policy) -> None:
    """Refuse a policy whose state grows, or which cancels whole updates.

    Raises:
      ValueError: it does.
    """
    policy.init(1, namespace)  # refuses a history of unbounded length
    one = np.ones(1, np.float32)
    if policy.limit(policy.init(1), one, param_norms=one).cancels:
        way_out = 'a gradient transformer cannot do that; use Drop(..., action="zero")'
        rule = 'without Drop(action="skip"), which cancels whole updates'
        raise ValueError(format_error("policy", rule, policy, way_out))
