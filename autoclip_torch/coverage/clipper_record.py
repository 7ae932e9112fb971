"""What the check of coverage knows of one clipper."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from autoclip_torch.gradients.layout import get_stored
from autoclip_torch.gradients.sharded import get_local
from autoclip_torch.step.warn import warn

_STEPS_WITHOUT_CHANGE = 8
"""A measured parameter that is unchanged for so many steps is not trained."""


class ClipperRecord:
    """The parameters and the steps of one clipper. It keeps no parameter alive.

    The record of a clipper inside an optimizer outlives both: an optimizer that steps
    the same parameters later is not clipped.
    """

    def __init__(self) -> None:
        """Start before the first step, without parameters."""
        self.steps = 0
        """How many steps the clipper has begun in eager code."""
        self.is_registered = False
        self.owner: weakref.ref[Optimizer] | None = None
        """The optimizer in whose step it acts; None if it is called by hand."""
        self.is_wrapped = False
        """Whether it acts in the step of a `ClippedOptimizer` around the owner."""
        self.label = ""
        self.shapes: set[torch.Size] = set()
        self.is_served = False
        """Whether an optimizer has stepped its parameters since its last step."""
        self.other: str | None = None
        """An optimizer of parameters of the same shapes that has stepped since then."""
        self._parameters: list[TensorWeakRef] = []
        self._known: list[TensorWeakRef] = []
        self._is_joint = False
        self._gradient: Tensor | None = None
        self._gradient_version = 0
        self._suspect: tuple[TensorWeakRef, Tensor, int] | None = None
        self._is_cleared = False
        self._has_warned = False
        self._before_report: tuple[int, int] | None = None

    def set_parameters(
        self,
        parameters: Iterable[Tensor],
        known: Iterable[Tensor],
        label: str,
        is_joint: bool,
    ) -> None:
        """Continue with other parameters.

        Args:
          parameters: those that the clipper measures.
          known: these, and those that it leaves out.
          label: the name of one of them, for messages.
          is_joint: whether gradients share a norm.
        """
        self.label, self._is_joint = label, is_joint
        ordered = sorted(parameters, key=Tensor.numel)
        self.shapes = {parameter.shape for parameter in ordered}
        self._parameters = list(map(TensorWeakRef, ordered))
        self._known = list(map(TensorWeakRef, known))

    @property
    def parameters(self) -> list[Tensor]:
        """The measured parameters that exist, the smallest first."""
        return dereference(self._parameters)

    @property
    def known(self) -> list[Tensor]:
        """The parameters that exist, also those that the clipper leaves out."""
        return dereference(self._known)

    def shares(self, ids: set[int]) -> bool:
        """Return whether a measured parameter is one of those with these ids."""
        return any(id(parameter) in ids for parameter in self.parameters)

    def is_in(self, ids: set[int]) -> bool:
        """Return whether all measured parameters are among those with these ids."""
        return all(id(p) in ids or not p.requires_grad for p in self.parameters)

    def is_replaced_by(self, ids: set[int]) -> bool:
        """Return whether its optimizer is gone, and another one has its parameters."""
        is_gone = self.owner is not None and self.owner() is None
        return is_gone and self.shares(ids)

    def acts_in(self, optimizer: Optimizer) -> bool:
        """Return whether it clips what this optimizer steps: inside it, or by hand."""
        return self.owner is None or self.owner() is optimizer

    def begin_by_hand(self) -> None:
        """Count a step; warn once if its optimizer and its parameters were replaced."""
        is_useless = not self.is_served and self.has_same_gradient()
        other = self.other if self.steps and is_useless else None
        self.is_served, self.other = False, None
        self.steps += 1
        if other is not None and not self._has_warned:
            self._has_warned = True
            warn(
                f"the gradients of the clipper, such as that of {self.label}, did not "
                f"change since its last step, while {other} stepped parameters of the "
                "same shapes that no clipper has; make a clipper of the parameters "
                "that are trained now"
            )

    def keep_gradient(self) -> None:
        """Keep the gradient of the smallest parameter that has one, and its version."""
        self._gradient = gradient = self._find_gradient()
        self._gradient_version = 0 if gradient is None else _get_version(gradient)

    def has_same_gradient(self) -> bool:
        """Return whether no backward pass has changed that gradient, or none exists."""
        gradient, before = self._find_gradient(), self._gradient
        if gradient is None or gradient is not before:
            return gradient is before
        return _get_version(gradient) == self._gradient_version

    def _find_gradient(self) -> Tensor | None:
        for reference in self._parameters:
            parameter = dereference([reference])
            if parameter and parameter[0].grad is not None:
                return parameter[0].grad
        return None

    def find_unstepped(self, ids: set[int]) -> list[Tensor]:
        """Return the parameters in a common norm that are not among those stepped."""
        if self._is_cleared or not self._is_joint:
            return []
        return [
            parameter
            for parameter in self.parameters
            if id(parameter) not in ids
            and parameter.grad is not None
            and get_local(parameter).numel()
        ]

    def check_unstepped(self, unstepped: list[Tensor]) -> None:
        """Warn once if no optimizer steps parameters, and nothing else changes them."""
        if not unstepped:
            self._suspect = None
            return
        smallest = min(unstepped, key=Tensor.numel)
        if self._suspect is None or self._suspect[0]() is not smallest:
            copy = get_local(smallest).detach().clone()
            self._suspect = TensorWeakRef(smallest), copy, self.steps
            return
        _, copy, steps = self._suspect
        if self.steps - steps < _STEPS_WITHOUT_CHANGE:
            return
        self._is_cleared, self._suspect = True, None
        if torch.equal(copy, get_local(smallest)) and _is_nonzero(smallest.grad):
            warn(
                f"the clipper measures {len(unstepped)} parameters, such as one of "
                f"shape {tuple(smallest.shape)}, that no optimizer steps: their "
                "gradients make its norm too large; freeze them with "
                "requires_grad_(False), or call clipper.remove_params with them"
            )

    def check_is_called(self) -> None:
        """Warn if the weights change, but the optimizer runs no hooks in its step."""
        owner = None if self.owner is None or self.is_wrapped else self.owner()
        if owner is None or self._has_warned or runs_hooks(owner):
            self._before_report = None
            return
        now, before = count_changes(self.parameters), self._before_report
        self._before_report = self.steps, now
        if before is not None and before[0] == self.steps and before[1] < now:
            self._has_warned = True
            warn_of_replaced_step(owner)

    def __reduce__(self) -> Any:
        """Copy this object as a new one: a copied clipper has other parameters."""
        return ClipperRecord, ()


def runs_hooks(optimizer: Any) -> bool:
    """Return whether the optimizer's `step` runs torch's hooks, as far as is known."""
    return getattr(optimizer.step, "hooked", False)


def count_changes(parameters: Iterable[Tensor]) -> int:
    """Return how often the parameters were changed in place."""
    return sum(map(_get_version, parameters))


def warn_of_replaced_step(optimizer: Optimizer) -> None:
    """Warn that a replaced `step` leaves the clipper out."""
    warn(
        f"the step of the {type(optimizer).__name__} was replaced and runs no hooks of "
        "torch, so the clipper does not act; let the new step call the earlier one, or "
        "call clipper.detach(), then clipper.step() before each optimizer.step()"
    )


def dereference(references: Iterable[TensorWeakRef]) -> list[Tensor]:
    """Return the tensors that still exist."""
    tensors = (reference() for reference in references)
    return [tensor for tensor in tensors if tensor is not None]


def _get_version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _is_nonzero(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(get_stored(get_local(gradient)).any())
