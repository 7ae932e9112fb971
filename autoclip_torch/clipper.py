"""`Clipper`: rows, their policies' state, and `step()` between backward and update."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autoclip_core import Decision, Policy
from autoclip_core.checks import check_choice, check_flag
from autoclip_core.metrics import metrics, row_metrics
from autoclip_core.patterns import Pattern, as_patterns
from autoclip_core.policy import check_policy
from autoclip_core.scale import NONFINITE
from autoclip_core.settings import Around, choose_scope
from autoclip_core.units import Units

from .amp import LossScale, share_overflow, unscale_once, unwrap
from .attach import Attachment, check_unscaled
from .fit import check_fit, describe
from .groups import (
    Given,
    Group,
    Member,
    check_patterns,
    exclude_from,
    optimizer_groups,
    read_groups,
    refuse_shared,
    units_of,
)
from .learner import Learner
from .rows import Rows, make_rows
from .run_checks import refuse_nonfinite
from .series import as_series
from .settings import check_keys
from .stepper import Stepper

if TYPE_CHECKING:
    from .optim import ClippedOptimizer


class Clipper:
    """Clip gradients in place by any policy, at any scope.

    Call `step()` after `backward()` and before `optimizer.step()`.

    Args:
      parameters: a module, or an iterable of parameters, of (name, parameter) pairs or
        of groups `{"params": ..., "policy": ...}`, each with a policy of its own.
      policy: any policy of `autoclip_core`.
      scope: the gradients that share one norm: each "parameter" (the default), each
        "group", all of them ("global"), or each output "unit" of each parameter.
      global_clipping: the older spelling of `scope="global"`.
      nonfinite: what becomes of a row whose norm is NaN or infinite: "zero" sets its
        gradient to 0, "skip" cancels the whole update (every gradient becomes None,
        those of excluded parameters too), "raise" raises, "propagate" leaves it as it
        came. It is never recorded.
      warmup_steps: norms that each row records before the policy takes over, >= 0.
      warmup_threshold: the threshold until then, > 0; by default nothing is clipped.
      min_threshold: the threshold is never below this, > 0.
      max_threshold: the threshold is never above this, > 0, the warm-up included.
      exclude: parameters to leave out: names, names of modules, patterns with `*`,
        compiled regular expressions, or functions of (name, parameter).
      dry_run: observe, decide and learn, but touch no gradient.
      max_consecutive_skips: how many updates may be cancelled in a row before `step`
        (on an accelerator: `metrics`) raises a RuntimeError.
      process_group: the ranks that hold different parameters of one model, such as the
        stages of a pipeline, or experts: squared norms are summed over them, and every
        one must call `step`. The rows must be the same on all, as with scope="global".
        Sharded parameters (`DTensor`) bring their ranks along and need none.

    Raises:
      ValueError, TypeError: an argument breaks its rule; the message says which.

    >>> from autoclip_core import Fixed
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> clipper = Clipper([weight], Fixed(1.0))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> decision = clipper.step()
    >>> weight.grad, decision.norm
    (tensor([0.6000, 0.8000]), tensor([5.]))
    """

    _default_scope = "parameter"
    _stepper_class = Stepper

    def __init__(
        self,
        parameters: Given,
        policy: Policy,
        *,
        scope: str | None = None,
        global_clipping: bool | None = None,
        nonfinite: str = "zero",
        warmup_steps: int = 0,
        warmup_threshold: float | None = None,
        min_threshold: float | None = None,
        max_threshold: float | None = None,
        exclude: Pattern | Iterable[Pattern] | None = (),
        dry_run: bool = False,
        max_consecutive_skips: int | None = None,
        process_group: Any = None,
    ) -> None:
        """Check the arguments and lay out the rows."""
        check_policy(policy)
        self.policy = policy
        self.scope = choose_scope(scope, global_clipping, self._default_scope)
        self.nonfinite = check_choice("nonfinite", nonfinite, NONFINITE)
        self._around = Around(
            warmup_steps, warmup_threshold, min_threshold, max_threshold
        )
        self._attachment: Attachment | None = None
        self._exclude = as_patterns(exclude)
        self._groups = read_groups(parameters)
        check_patterns(self._groups, self._exclude)
        self._stepper = self._stepper_class(
            self._groups,
            self._lay_out(self._groups),
            nonfinite=self.nonfinite,
            dry_run=check_flag("dry_run", dry_run),
            most_skips=max_consecutive_skips,
            process_group=process_group,
        )

    @property
    def names(self) -> list[str]:
        """What each row is, in the order of a decision's entries."""
        return list(self._learner.rows.names)

    @property
    def dry_run(self) -> bool:
        """Whether every gradient is left alone; it may be set between steps."""
        return self._stepper.dry_run

    @dry_run.setter
    def dry_run(self, value: bool) -> None:
        self._stepper.dry_run = check_flag("dry_run", value)

    def step(self, *, scaler: Any = None, optimizer: Any = None) -> Decision:
        """Measure the gradients, decide, scale them in place, and learn their norms.

        Args:
          scaler: a `torch.amp.GradScaler`, given together with `optimizer`. It unscales
            the gradients first if it has not, and a step that overflowed is no norm to
            learn from. Without it, call `scaler.unscale_(optimizer)` before this:
            scaled gradients have no threshold, and an infinity that is set to 0 before
            `unscale_` would never lower the loss scale.
          optimizer: the optimizer whose gradients the scaler unscales.

        Returns:
          A `Decision` of tensors with one entry per row (see `names`), on the
          gradients' device. On an accelerator nothing is read back to the host, except
          with `nonfinite="raise"` or where an update may have to be skipped.

        Raises:
          FloatingPointError: a norm is not finite and `nonfinite="raise"`; no gradient
            and no history was changed.
          RuntimeError: more than `max_consecutive_skips` updates in a row were skipped;
            the scaler has stepped the optimizer already; or the clipper is attached and
            clips inside the optimizer's step.
          ValueError: a gradient of another optimizer is still multiplied by the scale.
        """
        if self._attachment is not None and not torch.compiler.is_compiling():
            self._attachment.refuse_by_hand()
        if scaler is None and optimizer is None:
            return self._stepper.step(LossScale())
        parameters = self._stepper.parameters
        scale = unscale_once(scaler, optimizer)
        check_unscaled(parameters, scaler, unwrap(optimizer))
        decision = self._stepper.step(scale)
        if parameters.ranks is not None:
            share_overflow(scaler, optimizer, scale.overflow)
        return decision

    def attach(self, optimizer: Any) -> Attachment:
        """Clip inside `optimizer.step()`; the loop has no other line to add.

        With a closure (LBFGS, Lightning) clipping follows each backward in it. Wrappers
        such as Accelerate's are looked through. After a `GradScaler` overflow nothing
        is learned. With `fused=True`, gradients that share one norm are scaled in the
        optimizer's own kernel, and a cancelled update is cancelled there: no pass over
        the gradients, nothing read back; there, nonfinite="zero" cancels the update.

        Args:
          optimizer: the torch optimizer of these parameters, or a wrapper around it.

        Returns:
          A handle; `remove()` ends the attachment. A copied or unpickled optimizer has
          no hooks: attach to it anew.

        Raises:
          RuntimeError: the clipper is attached already.
          ValueError: the optimizer does not step all that the clipper has and trains.
          TypeError: it is no torch optimizer.

        >>> from autoclip_core import Fixed
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> handle = Clipper([weight], Fixed(1.0)).attach(optimizer)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        """
        if self._attachment is not None:
            self._attachment.refuse_another()
        optimizer = unwrap(optimizer)
        if getattr(optimizer, "clipper", None) is self:
            raise RuntimeError(
                "this optimizer was made by as_optimizer() and clips already; leave "
                "attach() out"
            )
        self._attachment = Attachment(self._stepper, optimizer)
        return self._attachment

    def detach(self) -> None:
        """End the attachment, if there is one."""
        if self._attachment is not None:
            self._attachment.remove()
            self._attachment = None

    @torch.no_grad()
    def threshold(self) -> Tensor:
        """Return each row's threshold for the next step, before its norm is known.

        For stacks that clip by themselves: give them this limit, and `observe` the norm
        they report afterwards.

        Raises:
          ValueError: the policy needs the current norm to set its threshold.
        """
        learner, parameters = self._learner, self._stepper.parameters
        return torch.as_tensor(learner.thresholds(parameters.norms(learner.device)))

    @torch.no_grad()
    def observe(self, norms: Any) -> Decision:
        """Learn norms that were measured elsewhere, without touching a gradient.

        Args:
          norms: one step, a number or shape (rows,); or a series of steps, shape
            (steps,) for one row or (steps, rows), such as yesterday's history. Negative
            and non-finite ones count as non-finite steps and are not recorded.

        Returns:
          The decision on the last step.

        Raises:
          ValueError: the shape does not fit the rows, or the series is empty.
          FloatingPointError: a norm is not finite and `nonfinite="raise"`; none of the
            series was learned.
        """
        learner = self._learner
        weights = self._stepper.parameters.norms(learner.device)
        series: Any = as_series(norms, len(self.names))
        series = series.numpy() if learner.device is None else series.to(learner.device)
        everywhere = (series == series) | (series != series)
        if self.nonfinite == "raise":
            for step, observed in zip(series, everywhere, strict=True):
                refuse_nonfinite(learner, step, observed)
        for step, observed in zip(series, everywhere, strict=True):
            decision = learner.decide(step, observed, weights)
        return Decision(*map(torch.as_tensor, decision))

    def metrics(self, *, per_row: bool = False) -> dict[str, float]:
        """Return what to log of the last step and of the run, in one transfer.

        Right after `load_state_dict` there is no last step yet: until the next one the
        norm is 0 and the threshold +inf; the counts go on.

        Args:
          per_row: whether to add norm, threshold, scale and clip rate of every row, as
            `clip/norm/<name>` and so on.

        Returns:
          The names of `autoclip_core.metrics.metrics`, each a float.

        Raises:
          RuntimeError: more than `max_consecutive_skips` updates in a row were skipped.
        """
        decision, tally = self._learner.on_host()
        self._stepper.checks.check_skips(tally)
        found = {name: float(value) for name, value in metrics(decision, tally).items()}
        return found | row_metrics(self.names, decision, tally) if per_row else found

    def reset(self) -> None:
        """Forget every norm and count, as if no step had been taken."""
        self._stepper.reset()

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Add a group of parameters; the rows that are there keep their history.

        Args:
          group: `{"params": ...}`, with what the constructor accepts in a group.
        """
        groups = [*self._groups, *read_groups([group])]
        refuse_shared(groups)
        self._stepper.extend(groups, self._lay_out(groups))
        self._groups = groups

    def state_dict(self) -> dict[str, Any]:
        """Return everything that decides later thresholds: tensors and plain Python."""
        return {**self._describe(), **self._learner.to_plain()}

    def load_state_dict(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Go on where another clipper stopped; a resumed run has the same bits.

        Args:
          state: what `state_dict()` returned.
          strict: whether plain settings (a quantile, a cap) must agree. If not, this
            clipper's are kept; class, scope, shapes and history length must still fit.

        Raises:
          ValueError: the state does not fit; the message names the difference, and
            nothing was changed.
        """
        check_fit(state, self.state_dict(), strict)
        self._learner.from_plain(state)

    @classmethod
    def as_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *policy: Policy,
        model: torch.nn.Module | None = None,
        **keywords: Any,
    ) -> "ClippedOptimizer":
        """Return an optimizer that clips, then steps.

        Args:
          optimizer: any torch optimizer; each of its groups is a group here, and none
            of its settings is read.
          *policy: the policy, for the generic `Clipper` alone.
          model: the module the parameters belong to, for their names and layers.
          **keywords: what the constructor accepts.
        """
        from .optim import (
            ClippedOptimizer,
        )  # it imports the named clippers, and they this

        clipper = cls(optimizer_groups(optimizer, model), *policy, **keywords)
        return ClippedOptimizer(optimizer, clipper)

    @property
    def _learner(self) -> Learner:
        """What was learned so far."""
        return self._stepper.learner

    def _lay_out(self, groups: Sequence[Group]) -> Rows:
        """Return the rows of what is not excluded, each group under its own policy."""

        def policy_of(overrides: dict[str, Any]) -> Policy:
            return self._around(self._group_policy(overrides))

        left = exclude_from(groups, self._exclude)
        return make_rows(left, self.scope, policy_of, self._units)

    def _group_policy(self, overrides: dict[str, Any]) -> Policy:
        """Return the policy of a group; the named clippers accept its arguments."""
        check_keys(overrides, ["policy"])
        policy: Policy = overrides.get("policy", self.policy)
        check_policy(policy)
        return policy

    def _units(self, member: Member) -> Units:
        """Return how a parameter is cut into units."""
        return units_of(member)

    def _describe(self) -> dict[str, Any]:
        """Return what a state must agree with; a clipper adds settings of its own."""
        return describe(type(self).__name__, self.nonfinite, self._learner.rows)
