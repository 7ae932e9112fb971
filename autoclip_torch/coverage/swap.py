"""Warn if another optimizer steps in place of the one in which a clipper acts."""

import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils.weak import TensorWeakRef

from autoclip_torch.optimizer_steps.global_hook import (
    add_hook,
    list_hooks,
    remove_hook,
)
from autoclip_torch.optimizer_steps.open_steps import is_in_step, is_outermost_step
from autoclip_torch.step.unwrap import stepped_parameter_ids
from autoclip_torch.step.warn import warn


class SwapCheck:
    """Whether one clipper acts in the steps of its parameters.

    Each step of any optimizer calls this object. It keeps neither the
    clipper nor the optimizer nor a parameter alive, and it outlives the first two: the
    optimizer that steps the same parameters next is not clipped. The check ends with
    `remove`, or when another clipper gets one of the parameters.

    Args:
      optimizer: the optimizer in whose step the clipper acts. None: it is a copy, which
        acts in no step.
      is_wrapped: whether the clipper acts in the step of a `ClippedOptimizer` around
        the optimizer, and not in each step of the optimizer.
    """

    def __init__(self, optimizer: Optimizer | None, is_wrapped: bool) -> None:
        self._owner = None if optimizer is None else weakref.ref(optimizer)
        self._has_acted = False
        self._thread: int | None = None
        self._is_wrapped = is_wrapped
        self._has_ended = False
        self._parameters: list[TensorWeakRef] = []
        self._modules: list[weakref.ref[nn.Module]] = []
        self._ids_in_modules: set[int] = set()
        self._label = ""
        self._others = self._most_others = self._missed = 0
        add_hook(_global_optimizer_post_hooks, self)

    @property
    def owner(self) -> Optimizer | None:
        """The optimizer, if it still exists."""
        return None if self._owner is None else self._owner()

    def note_clip(self) -> None:
        """Note that the clipper acts in a step of an optimizer, in this thread."""
        self._has_acted = True
        if not torch.compiler.is_compiling():  # it cannot trace `get_ident`
            self._thread = threading.get_ident()

    def set_parameters(
        self, parameters: Iterable[Tensor], modules: Iterable[nn.Module], label: str
    ) -> None:
        """Continue with other parameters.

        Args:
          parameters: those that the clipper measures.
          modules: those that hold all of them, if they are known.
          label: the name of a parameter, for the message.
        """
        self._parameters = list(map(TensorWeakRef, parameters))
        self._modules, self._label = list(map(weakref.ref, modules)), label
        self._ids_in_modules = set(map(id, self._list_present()))

    def remove(self) -> None:
        """End the check; the steps do not call this object any more."""
        remove_hook(_global_optimizer_post_hooks, self)

    def is_over(self) -> bool:
        """Return whether the check can find nothing more."""
        return self._has_ended or not self._dereference()[0]

    def shares(self, ids: set[int]) -> bool:
        """Return whether a trained parameter is one of those with these ids."""
        return any(id(parameter) in ids for parameter in self._list_trained())

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Count the steps in which the clipper did not act.

        It checks the optimizer if there were more of them than between the last two
        steps of the clipper. A check that finds nothing delays the next one.
        """
        if torch.compiler.is_compiling() or self._has_ended:
            return
        if self._thread not in (None, threading.get_ident()):  # of other models
            return
        if self._has_acted:
            self._has_acted = False
            self._others, self._most_others, self._missed = 0, self._others, 0
            return
        self._others += 1
        if self._others <= self._most_others:
            return
        if not self._is_missed(optimizer):
            self._most_others = self._others * 3 // 2
            return
        self._missed += 1
        if self._missed == 2 or self.owner is None:
            self._has_ended = True
            self._warn(optimizer)

    def _is_missed(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer has stepped what the clipper was to clip.

        It has stepped all of it, or a part after the owner was deleted. While the owner
        exists, another optimizer may share a part on purpose.
        """
        trained = set(map(id, self._list_trained()))
        missed = trained & stepped_parameter_ids(optimizer)
        if not missed or (self.owner is not None and missed != trained):
            return False
        if self.owner is optimizer:
            return self._is_wrapped and is_outermost_step(optimizer)
        is_inside = self.owner is not None and is_in_step(self.owner)
        return not is_inside and is_outermost_step(optimizer)

    def _list_trained(self) -> list[Tensor]:
        """Return the parameters that are to be clipped.

        If the modules train none of those of the clipper any more, these are the new
        ones that they train, such as adapters.
        """
        parameters, modules = self._dereference()
        trained = [p for p in parameters if p.requires_grad]
        if not modules:
            return trained
        present = [p for p in self._list_present() if p.requires_grad]
        ids = set(map(id, present))
        new = [p for p in present if id(p) not in self._ids_in_modules]
        return [p for p in trained if id(p) in ids] or new

    def _list_present(self) -> list[Tensor]:
        """Return the parameters that the modules have now."""
        return [p for module in self._dereference()[1] for p in module.parameters()]

    def _dereference(self) -> tuple[list[Tensor], list[nn.Module]]:
        """Return the parameters and the modules that still exist."""
        parameters = [reference() for reference in self._parameters]
        modules = [reference() for reference in self._modules]
        return (
            [parameter for parameter in parameters if parameter is not None],
            [module for module in modules if module is not None],
        )

    def __reduce__(self) -> Any:
        """Copy this object as one whose clipper acts nowhere, until it is attached."""
        return _make_copy, (*self._dereference(), self._label, self._is_wrapped)

    def _warn(self, optimizer: Optimizer) -> None:
        kind = type(optimizer).__name__
        if self._is_wrapped:
            warn(
                f"{kind} stepped parameters, such as {self._label}, that the optimizer "
                "of as_optimizer() clips, but that one did not step; step it, or wrap "
                "the new optimizer by as_optimizer(), too; to end the clipping, call "
                "optimizer.clipper.detach()"
            )
            return
        warn(
            f"{kind} stepped parameters of a clipper, such as {self._label}, but the "
            "clipper does not act in its step; call clipper.detach(), then "
            "clipper.attach(optimizer), or make an UpdateClipper or TrustClip of it"
        )


def _make_copy(
    parameters: list[Tensor], modules: list[nn.Module], label: str, is_wrapped: bool
) -> SwapCheck:
    check = SwapCheck(None, is_wrapped)
    check.set_parameters(parameters, modules, label)
    return check


def end_swap_checks(parameters: Iterable[Tensor]) -> None:
    """End the checks of the earlier clippers of parameters, and those that are over."""
    ids = set(map(id, parameters))
    for hook in list_hooks(_global_optimizer_post_hooks):
        if isinstance(hook, SwapCheck) and (hook.is_over() or hook.shares(ids)):
            hook.remove()
