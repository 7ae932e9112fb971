"""`ValueClip`: limit every element of a gradient to an interval."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Unpack

from torch import Tensor

from autoclip_core import Decision, Fixed, Policy
from autoclip_core.checks import check_positive
from autoclip_core.clipper.by_value import decide_by_value
from autoclip_core.clipper.settings import check_keywords
from autoclip_core.loss import LossDecision
from autoclip_core.policy import get_arguments
from autoclip_core.scale import as_norms

from .clipper import Clipper
from .gradients.dtensor import is_partial, sum_partial
from .gradients.layout import Gradients, as_real, make_writable
from .rows.read import ParametersLike
from .rows.rows import Rows
from .rows.settings import ClipperKeywords, check_keys
from .step.amp import LossScale
from .step.stepper import Stepper


class ValueStepper(Stepper):
    """The steps of a clipper that limits each element of a gradient."""

    extra_sequences = 2

    @property
    def has_one_factor(self) -> bool:
        """False: each element has its own factor."""
        return False

    def split(self, rows: Rows) -> Rows:
        """Return the rows: the norm after clamping is measured, not computed."""
        return rows

    def measure(
        self,
        gradients: Sequence[Tensor | None],
        loss_scale: LossScale,
        *others: Gradients,
    ) -> list[Any]:
        """Return the norms, which rows have one, and two further norms of each row.

        They are the norm after clamping, and the norm of what clamping removes.
        """
        if (factor := loss_scale.factor) is not None:  # only a dry run leaves one
            gradients = [g if g is None else g / factor.to(g.device) for g in gradients]
        # The limit holds for the sums of a `Partial`, not for its summands.
        gradients = [sum_partial(gradient) for gradient in gradients]
        return super().measure(
            gradients,
            loss_scale._replace(factor=None),
            self._map(_clamp_copy, gradients),
            self._map(_cut_off, gradients),
        )

    def decide(
        self, norms: Any, observed: Any, *others: Any, loss: LossDecision | None = None
    ) -> Decision:
        """Return the decision that describes what clamping does; record no norm."""
        states, (norms_after, removed) = self.policy_states, others
        return states.count_step(
            decide_by_value(
                norms,
                norms_after,
                as_norms(removed, states.xp) > 0,
                thresholds=states.get_thresholds(None),
                observed=observed,
                nonfinite=states.nonfinite,
                loss=loss,
                xp=states.xp,
            )
        )

    def scale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Set rows that are not finite to 0, then clamp every element."""
        if self.policy_states.nonfinite == "zero":
            one = decision.scale * 0 + 1
            scales = self.policy_states.xp.where(decision.finite, one, 0.0)
            super().scale(gradients, decision._replace(scale=scales))
        entries = self.rows.by_parameter
        for entry, limit in zip(entries, self._get_limits(), strict=True):
            gradient = entry.parameter.grad
            if gradient is None or not entry.is_scaled:
                continue
            if gradient.is_sparse:
                entry.parameter.grad = _clamp_copy(gradient, limit)
            elif is_partial(gradient):
                entry.parameter.grad = _clamp_(sum_partial(gradient), limit)
            else:
                _clamp_(make_writable(entry, gradient), limit)

    def _map(
        self, function: Callable[[Tensor, float], Tensor], gradients: Gradients
    ) -> Gradients:
        """Yield the result of a function for each gradient, one at a time."""
        for gradient, limit in zip(gradients, self._get_limits(), strict=True):
            yield None if gradient is None else function(gradient, limit)

    def _get_limits(self) -> list[float]:
        """Return the clip value of each parameter; +inf if it is only measured."""
        limits, by_policy = [], self.rows.by_policy
        for entry in self.rows.by_parameter:
            blocks = (b for b in by_policy if b.start <= entry.start < b.stop)
            # A parameter without rows has nothing to clip, and perhaps no policy.
            policy: Any = next(blocks, by_policy[0]).policy
            limits.append(policy.max_norm if entry.is_scaled else float("inf"))
        return limits


class ValueClip(Clipper):
    """Clip each element to [-clip_value, clip_value], and report the change of norm.

    This is not a policy: the direction of a gradient changes, too. In the decision,
    `norm` is the norm before clipping, `threshold` is the clip value, and `scale` is
    the norm after divided by the norm before. `clipped` says whether any element of the
    row changed. With `nonfinite="propagate"`, an infinite element is clipped like any
    other, and a NaN stays.

    Args:
      parameters: see `Clipper`.
      clip_value: the largest magnitude, > 0. It limits each part of a complex element.
      **keywords: scope, global_clipping, norm, nonfinite, exclude, scale_only, dry_run,
        loss_policy and max_consecutive_skips, as in `Clipper`. With `scale_only`, the
        elements of the other parameters are measured and not clipped.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> decision = ValueClip([weight], clip_value=3.5).step()
    >>> weight.grad, decision.norm
    (tensor([3.0000, 3.5000]), tensor([5.]))
    """

    _stepper_class = ValueStepper

    def __init__(
        self,
        parameters: ParametersLike,
        clip_value: float,
        **keywords: Unpack[ClipperKeywords],
    ) -> None:
        check_keywords(type(self), keywords, ClipperKeywords)
        policy = Fixed(check_positive("clip_value", clip_value))
        super().__init__(parameters, policy, **keywords)

    def observe(self, norms: Any) -> NoReturn:
        """Raise a TypeError: no threshold depends on a norm.

        Raises:
          TypeError: always.
        """
        raise TypeError("ValueClip records no norms: it clips each element")

    def _get_arguments(self) -> dict[str, Any]:
        return {"clip_value": get_arguments(self.policy)["max_norm"]}

    @staticmethod
    def _make_group_policy(policy: Policy, overrides: dict[str, Any]) -> Policy:
        check_keys(overrides, ["clip_value"])
        if not overrides:
            return policy
        return Fixed(check_positive("clip_value", overrides["clip_value"]))


def _clamp_copy(gradient: Tensor, limit: float) -> Tensor:
    """Return a copy with every element in [-limit, limit], complex ones by part."""
    copy = gradient.coalesce().clone() if gradient.is_sparse else gradient.clone()
    return _clamp_(copy, limit)


def _cut_off(gradient: Tensor, limit: float) -> Tensor:
    """Return what clamping removes, with any sign: 0 in each unchanged element."""
    if not gradient.is_sparse:
        return gradient - _clamp_copy(gradient, limit)
    # Coalesced once: summed in another order, duplicates may differ in a bit.
    gradient = gradient.coalesce()
    removed = _clamp_copy(gradient, limit)
    removed._values().sub_(gradient._values())
    return removed


def _clamp_(gradient: Tensor, limit: float) -> Tensor:
    """Clamp every element of a dense or coalesced gradient in place."""
    as_real(gradient).clamp_(-limit, limit)
    return gradient
