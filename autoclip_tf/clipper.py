"""`Clipper`: a gradient transformer, from (gradient, variable) pairs to pairs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from autoclip_core import Policy, decide
from autoclip_core.clipper.parts import get_part_scales, measure_scale
from autoclip_core.clipper.patterns import Pattern, as_patterns, as_scale_patterns
from autoclip_core.clipper.serialize import policy_from_dict, policy_to_dict
from autoclip_core.clipper.settings import (
    PolicyBounds,
    check_traceable,
    choose_scope,
    format_clipper,
)
from autoclip_core.policy import check_policy

from .gradients import namespace
from .gradients.measure import find_observed_rows, measure_parts, measure_rows
from .gradients.parts import Part, scale_all
from .gradients.rows import Rows
from .layouts import UnitsOf, make_unit_rule
from .optimizers import add_transformers
from .state.settings import PATTERNS, Settings, find_policy, patterns_from_config
from .state.transformer import StatefulTransformer, without_autograph
from .state.variables import MakeVariable, StateVariables, make_variable
from .step.optimizer_mixin import Pair


@keras.saving.register_keras_serializable("autoclip_tf")
class Clipper(StatefulTransformer):
    """Clip gradients by any policy, at any scope, inside a Keras optimizer.

    A clipper is a callable from a list of (gradient, variable) pairs to such a list.
    Pass it as `gradient_transformers` to an optimizer of `autoclip_tf.optimizers` or of
    `tf_keras.optimizers.legacy`, or call it in a custom training loop. It runs eagerly,
    in graphs and under XLA.

    Args:
      policy: any policy of `autoclip_core`.
      scope: the gradients that share one norm: each "parameter" (the default), all of
        them ("global"), or each output "unit" of each variable.
      global_clipping: the older spelling of `scope="global"`.
      norm: the norm of a row: "l2"; "rms", the l2 norm divided by the square root of
        the number of elements; or "max", the largest magnitude. Thresholds, recorded
        norms and the norms of variables are norms of this kind.
      nonfinite: the rule for a row whose norm is NaN or infinite: "zero" sets its
        gradient to 0, "propagate" leaves it unchanged. The norm is never recorded.
      warmup_steps: norms that each row records before the policy is used, >= 0.
      warmup_threshold: the threshold until then, > 0; by default nothing is clipped.
      min_threshold: the threshold is never below this, > 0.
      max_threshold: the threshold is never above this, > 0, also during the warm-up.
      exclude: variables that are not measured and not scaled: names of layers or
        variables, ends of paths, patterns with `*`, compiled regular expressions,
        functions of (path, variable).
      scale_only: the variables that clipping scales, in the forms of `exclude`; by
        default all. The others belong to the norm of their row and are not scaled. A
        row that is not finite or dropped is still set to 0 as a whole. In a decision,
        `scale` is then the norm after divided by the norm before.
      dry_run: measure, decide and record, but change no gradient.

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
        norm: str = "l2",
        nonfinite: str = "zero",
        warmup_steps: int = 0,
        warmup_threshold: float | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
        exclude: Pattern | Iterable[Pattern] | None = None,
        scale_only: Pattern | Iterable[Pattern] | None = None,
        dry_run: bool = False,
    ) -> None:
        """Check the arguments."""
        super().__init__()
        check_policy(policy)
        self.policy = policy
        self._settings = Settings(
            scope,
            global_clipping,
            norm,
            nonfinite,
            warmup_steps,
            warmup_threshold,
            min_threshold,
            max_threshold,
            exclude,
            dry_run,
            scale_only,
        )
        self.scope = choose_scope(scope, global_clipping, self._default_scope)
        as_patterns(exclude)
        as_scale_patterns(scale_only)
        bounds = PolicyBounds(
            warmup_steps, warmup_threshold, min_threshold, max_threshold
        )
        self._limits = bounds.apply(policy)
        way_out = 'a gradient transformer cannot do that; use Drop(..., action="zero")'
        check_traceable(self._limits, namespace, way_out)

    def build(
        self, variables: Sequence[Any], make: MakeVariable = make_variable
    ) -> None:
        """Assign rows to the variables and make the variables of the state.

        An optimizer of `autoclip_tf.optimizers` does this. In a custom loop without
        such an optimizer the first step does it. Call it yourself before the first
        step if a variable may have no gradient in that step.

        Args:
          variables: all the variables that can occur.
          make: from a name and an initial value to a variable of the state.

        Raises:
          ValueError: the clipper is built already, for another optimizer; or a pattern
            does not fit the variables.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> clip.build([weight])
        >>> len(clip.names), clip.metrics()["clip/steps"]
        (1, 0.0)
        """
        self._build_without_later(variables, make)
        self._add_later_variables(make)

    def _build_without_later(
        self, variables: Sequence[Any], make: MakeVariable
    ) -> None:
        if self.built:
            raise ValueError(
                f"a clipper must belong to one optimizer, got a {type(self).__name__} "
                "that holds the history of another one; make a second clipper with "
                f"{type(self).__name__}.from_config(clipper.get_config())"
            )
        patterns = as_patterns(self._settings.exclude)
        scaled = as_scale_patterns(self._settings.scale_only)
        norm = self._settings.norm
        rows = Rows(variables, self.scope, self._units(), patterns, scaled, norm)
        self._rows = rows
        self._state = StateVariables(self._limits, len(rows.names), make)

    @without_autograph
    def __call__(self, grads_and_vars: Iterable[Pair]) -> list[Pair]:
        """Take one step: measure, decide, record, and return the scaled pairs.

        Args:
          grads_and_vars: pairs of a gradient (dense, `tf.IndexedSlices`, or None) and
            its variable.

        Returns:
          The pairs in the same order. A gradient within its limit is unchanged bit for
          bit.

        >>> from autoclip_core import Fixed
        >>> weight, clip = keras.Variable([0.0]), Clipper(Fixed(2.0))
        >>> [(gradient, _)] = clip([(ops.convert_to_tensor([4.0]), weight)])
        >>> ops.convert_to_numpy(gradient).tolist()
        [2.0]
        """
        pairs = list(grads_and_vars)
        if not self.built:
            self.build([variable for _, variable in pairs])
        rows = self._built_rows()
        parts = {}
        for index, (gradient, variable) in enumerate(pairs):
            variable_rows = rows.find_rows(variable)
            if variable_rows is not None and gradient is not None:
                parts[index] = Part(variable_rows, gradient, tuple(variable.shape))
        scaled = self._step(list(parts.values()), rows)
        for index, gradient in zip(parts, scaled, strict=True):
            pairs[index] = (gradient, pairs[index][1])
        return pairs

    def as_optimizer(self, optimizer: Any) -> Any:
        """Return a new Keras optimizer with the same settings that clips first.

        Args:
          optimizer: a Keras 3 optimizer that is not built yet.

        Raises:
          ValueError: `optimizer` is built, or wraps another optimizer.
          TypeError: `optimizer` is not a Keras optimizer.

        >>> from autoclip_tf import QuantileClip
        >>> adam = QuantileClip(quantile=0.9).as_optimizer(keras.optimizers.AdamW(1e-3))
        >>> type(adam).__name__, adam.gradient_transformers[0].policy.quantile
        ('AdamW', 0.9)
        """
        return add_transformers(optimizer, [self])

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make an equal clipper, as plain data to save.

        >>> from autoclip_tf import QuantileClip
        >>> config = QuantileClip(0.5, scope="global").get_config()
        >>> config["quantile"], config["scope"]
        (0.5, 'global')
        """
        arguments = {
            name: policy_to_dict(value) if value is self.policy else value
            for name, value in self._arguments().items()
        }
        return {**arguments, **self._settings.to_config()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Clipper":
        """Return the clipper that `get_config` described, without its history.

        Args:
          config: the result of `get_config`.

        Raises:
          TypeError, ValueError: an argument breaks its rule; the message says which.

        >>> from autoclip_tf import NormClip
        >>> NormClip.from_config(NormClip(2.0).get_config())
        NormClip(max_norm=2.0, scope='global')
        """
        arguments = dict(config)
        for name in PATTERNS:
            arguments[name] = patterns_from_config(config.get(name))
        if isinstance(config.get("policy"), Mapping):
            arguments["policy"] = policy_from_dict(config["policy"], find_policy)
        return cls(**arguments)

    def __repr__(self) -> str:
        """Return code that makes an equal clipper; a built one adds its row count."""
        settings = self._settings.non_defaults()
        for name in ("scope", "global_clipping"):
            settings.pop(name, None)
        if self.built:
            settings["rows"] = len(self.names)
        return format_clipper(type(self), self._arguments(), self.scope, settings)

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor except the common ones."""
        return {"policy": self.policy}

    def _units(self) -> UnitsOf:
        """Return the function that cuts a variable into units, for scope "unit"."""
        return make_unit_rule("unit", {})

    def _step(self, parts: list[Part], rows: Rows) -> list[Any]:
        """Measure, decide and record; return the scaled gradients."""
        state = self._state.read()
        part_norms, sizes = measure_parts(parts, rows)
        policy_state, decision = decide(
            self._limits,
            state.policy,
            rows.join(part_norms, sizes),
            observed=find_observed_rows(parts, rows),
            param_norms=self._param_norms(),
            nonfinite=self._settings.nonfinite,
            xp=namespace,
        )
        scales = decision.scale
        if rows.is_split:
            scales = get_part_scales(decision, namespace)
            decision = measure_scale(
                decision, part_norms, rows.norm, sizes=sizes, xp=namespace
            )
        self._state.write_step(decision, state.tally, policy_state)
        if self._settings.dry_run or not parts:
            return [part.tensor for part in parts]
        return scale_all(parts, scales)

    def _param_norms(self) -> Any:
        """Return the norm of each row's variables, or None if the policy needs none."""
        if not self._limits.needs_param_norms:
            return None
        rows = self._built_rows()
        parts = [
            Part(variable_rows, ops.convert_to_tensor(variable), tuple(variable.shape))
            for variable, variable_rows in rows.clipped_variables()
        ]
        return measure_rows(parts, rows)
