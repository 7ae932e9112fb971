"""`PolicyClipper`: what a clipper of gradients and a clipper of updates share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, Unpack

from autoclip_core import Policy, decide
from autoclip_core.clipper.parts import get_part_scales, measure_scale
from autoclip_core.clipper.patterns import as_patterns, as_scale_patterns
from autoclip_core.clipper.serialize import policy_from_dict, policy_to_dict
from autoclip_core.clipper.settings import (
    WarmupKeywords,
    check_keywords,
    check_traceable,
    choose_scope,
    format_clipper,
)
from autoclip_core.policy import check_policy

from .gradients import namespace
from .gradients.measure import find_observed_rows, measure_parts, measure_rows
from .gradients.row_tensor import RowTensor
from .gradients.rows import Rows
from .layouts import UnitsOf, make_unit_rule
from .optimizers import add_transformers
from .state.settings import PATTERNS, Settings, find_policy, patterns_from_config
from .state.transformer import StatefulTransformer
from .state.variables import MakeVariable, StateVariables, make_variable


class PolicyClipper(StatefulTransformer):
    """A policy with its settings, its rows and its state; `Clipper` has the arguments.

    A subclass measures, calls `_decide`, and scales.
    """

    _default_scope = "parameter"
    _instead_of_skipping = (
        'a gradient transformer cannot do that; use Drop(..., action="zero")'
    )

    _keywords: Any = WarmupKeywords

    def __init__(self, policy: Policy, **keywords: Unpack[WarmupKeywords]) -> None:
        super().__init__()
        check_policy(policy)
        check_keywords(type(self), keywords, self._keywords)
        self.policy = policy
        self._settings = settings = Settings(**keywords)
        spellings = settings.scope, settings.global_clipping
        self.scope = choose_scope(*spellings, self._default_scope)
        self._limits = settings.bounds.apply(policy)
        check_traceable(self._limits, namespace, self._instead_of_skipping)

    def build(
        self, variables: Sequence[Any], make: MakeVariable = make_variable
    ) -> None:
        """Assign rows to the variables and make the variables of the state.

        An optimizer of `autoclip_tf.optimizers` does this. In a custom loop without
        such an optimizer the first step does it. Call it yourself before the first
        step if a variable may have no gradient in that step.

        Args:
          variables: all the variables that can occur; without any, nothing is built.
          make: from a name and an initial value to a variable of the state.

        Raises:
          ValueError: the clipper is built already, for another optimizer; or a pattern
            does not fit the variables.

        >>> import keras
        >>> from autoclip_tf import NormClip
        >>> weight, clip = keras.Variable([0.0]), NormClip(2.0)
        >>> clip.build([weight])
        >>> len(clip.names), clip.metrics()["clip/steps"]
        (1, 0.0)
        """
        if variables:
            self._build_without_later(variables, make)
            self._add_later_variables(make)

    def _build_without_later(
        self, variables: Sequence[Any], make: MakeVariable
    ) -> None:
        if self.built:
            raise ValueError(
                "a clipper must belong to one optimizer, got one that holds the "
                "history of another; make a second clipper with "
                "type(clipper).from_config(clipper.get_config())"
            )
        patterns = as_patterns(self._settings.exclude)
        scaled = as_scale_patterns(self._settings.scale_only)
        norm = self._settings.norm
        rows = Rows(variables, self.scope, self._units(), patterns, scaled, norm)
        self._rows = rows
        self._state = StateVariables(self._limits, len(rows.names), make)

    def as_optimizer(self, optimizer: Any) -> Any:
        """Return a new Keras optimizer with the same settings that clips first.

        Args:
          optimizer: a Keras 3 optimizer that is not built yet.

        Raises:
          ValueError: `optimizer` is built, or wraps another optimizer.
          TypeError: `optimizer` is not a Keras optimizer.

        >>> import keras
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
    def from_config(cls, config: Mapping[str, Any]) -> Self:
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

    def _decide(
        self,
        tensors: list[RowTensor],
        parameters: Callable[[], list[RowTensor]],
        rows: Rows,
    ) -> Any:
        """Decide and record; return the scale of each part of a row.

        Args:
          tensors: what is measured.
          parameters: returns the variables of all rows; called only if the policy
            needs their norms.
          rows: the rows.
        """
        state = self._state.read()
        part_norms, sizes = measure_parts(tensors, rows)
        has_to_measure = self._limits.needs_param_norms
        policy_state, decision = decide(
            self._limits,
            state.policy,
            rows.join(part_norms, sizes),
            observed=find_observed_rows(tensors, rows),
            param_norms=measure_rows(parameters(), rows) if has_to_measure else None,
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
        return scales
