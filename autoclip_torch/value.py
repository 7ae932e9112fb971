"""Clip every element of a gradient to an interval."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypedDict, Unpack

from torch import Tensor

from autoclip_core import Decision, Fixed, Policy
from autoclip_core.checks import check_positive
from autoclip_core.clipper.by_value import decide_by_value
from autoclip_core.clipper.patterns import Pattern
from autoclip_core.clipper.settings import check_keywords
from autoclip_core.scale import as_norms

from .clipper import Clipper
from .gradients.layout import real, writable
from .gradients.measure import Gradients
from .gradients.sharded import is_partial, without_partial
from .rows.groups import Given
from .rows.settings import check_keys
from .step.amp import LossScale
from .step.stepper import Stepper


class _Keywords(TypedDict, total=False):
    """What `Clipper` has that makes sense without a policy."""

    scope: str | None
    global_clipping: bool | None
    nonfinite: str
    exclude: Pattern | list[Pattern]
    dry_run: bool
    max_consecutive_skips: int | None
    process_group: Any


class _ValueStepper(Stepper):
    """A step in which each element has a limit of its own."""

    @property
    def one_factor(self) -> bool:
        """No: each element has its own."""
        return False

    def _learn(self, gradients: list[Tensor | None], scale: LossScale) -> Decision:
        """Decide on true gradients, each element of which is compared."""
        if (factor := scale.factor) is not None:  # of a dry run, which leaves them
            gradients = [
                None if g is None else g / factor.to(g.device) for g in gradients
            ]
        # The sums of a `Partial` are clamped, and not its summands.
        gradients = [without_partial(gradient) for gradient in gradients]
        return super()._learn(gradients, scale._replace(factor=None))

    def decide(
        self,
        gradients: Sequence[Tensor | None],
        norms: Any,
        observed: Any,
        weights: Any,
    ) -> Decision:
        """Compare the norms of what clamping would leave, and of what it would cut."""
        states = self.policy_states
        (after, _), (cut, _) = self.parameters.measure(
            states.device,
            self._each(_clamped, gradients),
            self._each(_cut_off, gradients),
        )
        return states.count(
            decide_by_value(
                norms,
                after,
                as_norms(cut, states.xp) > 0,
                thresholds=states.thresholds(None),
                observed=observed,
                nonfinite=states.nonfinite,
                xp=states.xp,
            )
        )

    def rescale(self, gradients: Sequence[Tensor | None], decision: Decision) -> None:
        """Set to 0 what is not finite, then clamp all there is."""
        xp, rows = self.policy_states.xp, self.policy_states.rows
        if self.policy_states.nonfinite == "zero":
            one = decision.scale * 0 + 1
            only_finite = xp.where(decision.finite, one, 0.0)
            super().rescale(gradients, decision._replace(scale=only_finite))
        for entry, most in zip(rows.by_parameter, self._values(), strict=True):
            gradient = entry.parameter.grad
            if gradient is not None and gradient.is_sparse:
                entry.parameter.grad = _clamped(gradient, most)
            elif is_partial(gradient):
                entry.parameter.grad = _clamp_(without_partial(gradient), most)
            elif gradient is not None:
                _clamp_(writable(entry, gradient), most)

    def _each(
        self, function: Callable[[Tensor, float], Tensor], gradients: Gradients
    ) -> Gradients:
        """Yield what the function makes of each gradient, never all at a time."""
        for gradient, most in zip(gradients, self._values(), strict=True):
            yield None if gradient is None else function(gradient, most)

    def _values(self) -> list[float]:
        """Return the clip value of each entry."""
        rows, values = self.policy_states.rows, []
        for entry in rows.by_parameter:
            own = (
                block
                for block in rows.by_policy
                if block.start <= entry.start < block.stop
            )
            # An entry without rows has nothing to clip, and maybe no policy rows.
            policy: Any = next(own, rows.by_policy[0]).policy
            values.append(policy.max_norm)
        return values


class ValueClip(Clipper):
    """Clip each element to [-clip_value, clip_value], and say what it did to the norms.

    This is no policy: a direction changes, too. Of the decision, `norm` is the norm
    before, `threshold` the clip value, `scale` the norm after over the norm before, and
    `clipped` whether any element of the row changed. With `nonfinite="propagate"` an
    infinite element is clipped as any other, and a NaN stays.

    Args:
      parameters: see `Clipper`.
      clip_value: the largest magnitude, > 0; of complex elements, for each part.
      **keywords: scope, global_clipping, nonfinite, exclude, dry_run and
        max_consecutive_skips, as in `Clipper`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> decision = ValueClip([weight], clip_value=3.5).step()
    >>> weight.grad, decision.norm
    (tensor([3.0000, 3.5000]), tensor([5.]))
    """

    _stepper_class = _ValueStepper

    def __init__(
        self, parameters: Given, clip_value: float, **keywords: Unpack[_Keywords]
    ) -> None:
        """Check the value and make the clipper."""
        check_keywords(type(self).__name__, keywords, _Keywords)
        policy = Fixed(check_positive("clip_value", clip_value))
        super().__init__(parameters, policy, **keywords)

    def observe(self, norms: Any) -> NoReturn:
        """Refuse: there is nothing to learn from a norm.

        Raises:
          TypeError: always.
        """
        raise TypeError("ValueClip learns nothing from norms: it clips each element")

    def _group_policy(self, overrides: dict[str, Any]) -> Policy:
        check_keys(overrides, ["clip_value"])
        if not overrides:
            return self.policy
        return Fixed(check_positive("clip_value", overrides["clip_value"]))


def _clamped(gradient: Tensor, most: float) -> Tensor:
    """Return a copy with every element, or part of a complex one, in [-most, most]."""
    copy = gradient.coalesce().clone() if gradient.is_sparse else gradient.clone()
    return _clamp_(copy, most)


def _cut_off(gradient: Tensor, most: float) -> Tensor:
    """Return what clamping takes away, with any sign; 0 where it changes nothing."""
    if not gradient.is_sparse:
        return gradient - _clamped(gradient, most)
    # Of a coalesced tensor: added up in another order, duplicates may differ in a bit.
    gradient = gradient.coalesce()
    rest = _clamped(gradient, most)
    rest._values().sub_(gradient._values())
    return rest


def _clamp_(gradient: Tensor, most: float) -> Tensor:
    """Clamp every element of a dense or a coalesced gradient in place."""
    real(gradient).clamp_(-most, most)
    return gradient
