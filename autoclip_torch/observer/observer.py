"""`Observer`: rows, thresholds and checkpoints of a clipper; it touches no gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from autoclip_core import Decision, Policy
from autoclip_core.checks import check_choice
from autoclip_core.clipper.norms import check_norm
from autoclip_core.clipper.settings import PolicyBounds, format_clipper
from autoclip_core.clipper.units import Units
from autoclip_core.policy import check_policy
from autoclip_core.scale import NONFINITE
from autoclip_torch.coverage.check import CoverageCheck
from autoclip_torch.rows.groups import Group, NamedParameter, find_units
from autoclip_torch.rows.read import ParametersLike, read_groups
from autoclip_torch.rows.row_rules import RowRules, choose_group_policy
from autoclip_torch.rows.selection import Patterns, Selection
from autoclip_torch.state.by_name import describe_ambiguity
from autoclip_torch.state.compatibility import describe_clipper, fit_state
from autoclip_torch.state.observed_norms import as_series
from autoclip_torch.state.policy_states import PolicyStates
from autoclip_torch.step.run_checks import check_finite
from autoclip_torch.step.stepper import Stepper
from autoclip_torch.step.warn import warn

from .active_clippers import check_coverage, count_sharing
from .base import BaseClipper
from .followed_parameters import FollowedParameters
from .read_metrics import read_metrics


class Observer(BaseClipper):
    """The rows of parameters, and the policy states of their norms.

    This is the part of a `Clipper` for stacks that clip by themselves. It has three
    parts: `_stepper` takes the steps and holds the rows and the policy states,
    `_parameters` follows the model and the optimizer, and `_coverage` warns if the
    clipper does not clip what is trained.

    Args:
      parameters: as in `Clipper`.
      policy: the policy of all groups that do not set their own.
      scope, norm, nonfinite, exclude, scale_only, replicated: as in `Clipper`.
      bounds: the warm-up, the floor and the cap of each policy.
      **stepping: the other arguments of `Stepper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.
    """

    _stepper_class: type[Stepper] = Stepper
    _make_group_policy = staticmethod(choose_group_policy)
    _find_units: Callable[[NamedParameter], Units] = staticmethod(find_units)

    def __init__(
        self,
        parameters: ParametersLike,
        policy: Policy,
        *,
        scope: str,
        norm: str,
        nonfinite: str,
        bounds: PolicyBounds,
        exclude: Patterns,
        scale_only: Patterns,
        replicated: Patterns = None,
        **stepping: Any,
    ) -> None:
        check_policy(policy)
        self.policy = policy
        self.scope = scope
        self.norm = check_norm(norm)
        self.nonfinite = check_choice("nonfinite", nonfinite, NONFINITE)
        self._rules = RowRules(
            policy,
            scope,
            self.norm,
            Selection(exclude, scale_only, replicated, stepping.get("process_group")),
            bounds,
            self._make_group_policy,
            self._find_units,
        )
        groups = read_groups(parameters)
        self._rules.selection.check(groups)
        rows = self._rules.make_rows(groups)
        self._stepper = self._stepper_class(
            groups, rows, nonfinite=nonfinite, **stepping
        )
        self._coverage = CoverageCheck(self._stepper)
        self._parameters = FollowedParameters(
            parameters, self._rules, self._stepper, self._coverage
        )

    @property
    def parameters(self) -> list[Tensor]:
        """Every parameter of the first argument, the excluded ones too."""
        return self._parameters.all

    @property
    def names(self) -> list[str]:
        """The name of each row, in the order of a decision's entries."""
        return list(self._policy_states.rows.names)

    @property
    def process_group(self) -> Any:
        """The ranks that hold different parameters of one model, or None."""
        return self._stepper.process_group

    @torch.no_grad()
    def threshold(self) -> Tensor:
        """Return each row's threshold for the next step, before its norm is known.

        Pass it to a stack that clips by itself, then `observe` the norm it reports.

        Raises:
          ValueError: the policy needs the current norm to set its threshold.

        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.threshold()
        tensor([2.])
        """
        weights = self._stepper.measure_parameters()
        return torch.as_tensor(self._policy_states.get_thresholds(weights))

    @torch.no_grad()
    def observe(self, norms: Any) -> Decision:
        """Record norms that were measured elsewhere, without touching a gradient.

        Args:
          norms: one step, a number or shape (rows,); or a series of steps, shape
            (steps,) for one row or (steps, rows), such as the history of an earlier
            run. All are of the clipper's `norm`. Negative and non-finite norms count as
            non-finite steps. None counts a step without a norm. Neither is recorded.

        Returns:
          The decision on the last step.

        Raises:
          ValueError: the shape does not fit the rows, or the series is empty.
          FloatingPointError: a norm is not finite and `nonfinite="raise"`; no norm of
            the series was recorded.

        A single step calls `on_clip` or `on_skip`; a series calls neither.

        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.observe(8.0).scale
        tensor([0.2500])
        """
        states = self._policy_states
        states.sizes = None
        weights = self._stepper.measure_parameters()
        arrays = map(states.as_array, as_series(norms, len(self.names)))
        steps = list(zip(*arrays, strict=True))
        if self.nonfinite == "raise":
            for step, observed in steps:
                check_finite(states, step, observed, self._stepper.quantity)
        for step, observed in steps:
            decision = states.decide(step, observed, weights)
        if self._stepper.callbacks.are_set and len(steps) == 1:
            self._stepper.callbacks.report(states)
        self._stepper.checks.nonfinite.ignore_earlier_steps()
        return Decision(*map(torch.as_tensor, decision))

    def add_param_group(self, group: dict[str, Any] | Group) -> None:
        """Add a group of parameters; the existing rows keep their history.

        Args:
          group: `{"params": ...}`, with the keys that the constructor accepts.

        Raises:
          TypeError, ValueError: a parameter is not new, or a setting breaks its rule;
            nothing was changed.

        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
        >>> clipper.threshold()
        tensor([2., inf])
        """
        if not isinstance(group, dict | Group):
            raise TypeError(
                'group must be a dict with the key "params", got '
                f'{type(group).__name__}; write add_param_group({{"params": '
                "module.parameters()})"
            )
        self._parameters.add(read_groups([group]))

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later thresholds depend on: tensors and plain Python.

        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> clipper.state_dict()["class"]
        'QuantileClip'
        """
        return {**self._describe(), **self._policy_states.to_dict()}

    def load_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = True
    ) -> None:
        """Continue from a saved state. A resumed run is identical bit for bit.

        Args:
          state_dict: the result of `state_dict()`. Names match parameters, without the
            prefixes of wrappers (`module.`, `_orig_mod.`); else their order does. If
            only the clipper has no names, and shapes do not tell, a warning says so.
          strict: whether parameters and plain settings (a quantile, a cap) must agree.
            If not, this clipper keeps its settings, the rows in common continue, and
            the others start without a history. Class, scope and policies must fit.

        Raises:
          ValueError: the state does not fit; the message names the difference, and
            nothing was changed.

        >>> from autoclip_torch import QuantileClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> clipper = QuantileClip([weight], quantile=0.5)
        >>> decision = clipper.observe([1.0, 3.0])
        >>> other = QuantileClip([weight], quantile=0.5)
        >>> other.load_state_dict(clipper.state_dict())
        >>> other.threshold()
        tensor([2.])
        """
        current = self.state_dict()

        def make_empty() -> dict[str, Any]:
            return PolicyStates(self._policy_states.rows, self.nonfinite).to_dict()

        saved = fit_state(state_dict, current, strict, make_empty)
        self._policy_states.load_dict(saved, strict)
        if ambiguity := describe_ambiguity(saved, current):
            warn(ambiguity)
        self._stepper.checks.nonfinite.ignore_earlier_steps()

    def __repr__(self) -> str:
        """Return the class, its arguments that are not defaults, and the rows."""
        settings: dict[str, Any] = {"norm": self.norm, "nonfinite": self.nonfinite}
        settings |= vars(self._rules.bounds) | vars(self._rules.selection)
        settings |= self._stepper.settings
        shown = {k: v for k, v in settings.items() if v and v not in ("zero", "l2")}
        shown["rows"] = len(self.names)
        return format_clipper(type(self), self._get_arguments(), self.scope, shown)

    def _get_arguments(self) -> dict[str, Any]:
        """Return the arguments of the policy, named as in the constructor."""
        return {"policy": self.policy}

    @property
    def _observers(self) -> Sequence[Any]:
        return [self]

    def _read_metrics(self, per_row: bool) -> dict[str, float]:
        count = partial(count_sharing, self)
        return read_metrics(self._stepper, count, per_row=per_row)

    @property
    def _policy_states(self) -> PolicyStates:
        """The policy states and the counts."""
        return self._stepper.policy_states

    def _follow_optimizers(self, *optimizers: Optimizer) -> None:
        """Take over what has changed in the optimizers, before a step inside them."""
        self._parameters.follow_optimizers(*optimizers)
        check_coverage(self, optimizers)

    def _describe(self) -> dict[str, Any]:
        """Return what a state must agree with. Subclasses add settings."""
        rows = self._stepper.rows
        return describe_clipper(type(self).__name__, self.nonfinite, rows)
