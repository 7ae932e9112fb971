"""An optimizer that clips the gradients, then steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from autoclip_torch.loop.scaler_rule import refuse_other_unscaling
from autoclip_torch.optimizer_steps.open_steps import is_outermost_step
from autoclip_torch.rows.groups import Group
from autoclip_torch.step.amp import refuse_scaler, require_every_step
from autoclip_torch.step.closure import find_closure, run_after
from autoclip_torch.step.unwrap import stepped_parameters, unwrap

from .backward_in_step import BackwardCheck
from .clipper_chain import refuse_beside_trust_clip
from .optimizer_wrapper import OptimizerWrapper
from .optimizers import STEP_METHODS, make_hooks_run, refuse_step_in_backward

_KEY = "autoclip"
"""The key of the hooks in the optimizer inside."""


class ClippedOptimizer(OptimizerWrapper):
    """An optimizer whose `step` clips the gradients first.

    Learning-rate schedulers, `GradScaler`, hooks, pickle and deepcopy treat it as the
    optimizer inside, whose groups, state and other public attributes it has, such as
    `train` and `eval`. Its state dict is that of the optimizer inside, with the
    clipper's state under "clipper". It clips in the step of the optimizer inside, where
    the hooks of both and torch's global hooks run once. With SAM, it clips before
    `first_step` and `second_step`; in `step(closure)`, in each pass of the closure.

    Args:
      optimizer: the optimizer that steps.
      clipper: the `Clipper` of the same parameters.

    Raises:
      TypeError: `optimizer` is not a torch optimizer.

    >>> from autoclip_torch import NormClip
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> sgd = torch.optim.SGD([weight], lr=1.0)
    >>> optimizer = ClippedOptimizer(sgd, NormClip([weight], max_norm=1.0))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> weight.data
    tensor([-0.6000, -0.8000])
    """

    clipper: Any  # `Clipper`, whose module imports this one
    """The clipper."""
    _backward_check: BackwardCheck

    def __init__(self, optimizer: Optimizer, clipper: Any) -> None:
        """Put the clipper in front of the optimizer."""
        super().__init__(optimizer)
        refuse_step_in_backward(optimizer)
        make_hooks_run(unwrap(optimizer))
        self.clipper = clipper
        self._backward_check = BackwardCheck()
        self._register_clipper()
        if clipper.process_group is not None:
            require_every_step(self)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip and step; with a closure, clip after each of its backward passes.

        Args:
          closure: computes the loss and its gradients, and returns the loss.

        Returns:
          What the step of the optimizer inside returns: with a closure, the loss.

        Raises:
          FloatingPointError, RuntimeError: as `Clipper.step`.
          RuntimeError: a `GradScaler` steps it and the clipper has a `process_group`.

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        """
        inner: Any = unwrap(self.optimizer)
        before = inner._optimizer_step_pre_hooks
        after = inner._optimizer_step_post_hooks
        # In each step, and not once: the optimizer inside must not clip in a step of
        # its own. A handle of torch would be new to compiled code in each step.
        before[_KEY], after[_KEY] = self._before_step, self._after_step
        before.move_to_end(_KEY, last=False)
        try:
            return self.optimizer.step(*([] if closure is None else [closure]))
        finally:
            del before[_KEY], after[_KEY]

    # torch does not wrap a step that has this mark. Its wrapper would run the hooks of
    # this optimizer, and the global step hooks, which the optimizer inside runs.
    step.hooked = True  # type: ignore[attr-defined]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Mark the step of a subclass, too: it calls the step of this class."""
        super().__init_subclass__(**keywords)
        cls.step.hooked = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        """Return a public attribute of the optimizer inside; its steps clip first."""
        value = super().__getattr__(name)
        if name not in STEP_METHODS:
            return value

        def clip_and_step(*args: Any, **keywords: Any) -> Any:
            self._clip()
            return value(*args, **keywords)

        return clip_and_step

    def _before_step(
        self, inner: Optimizer, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Run the hooks before the step, then clip."""
        if not is_outermost_step(inner):
            return None
        args = (self, *args[1:])  # args[0] is the optimizer inside
        for hook in self._optimizer_step_pre_hooks.values():
            if (changed := hook(self, args, kwargs)) is not None:
                args, kwargs = changed
        if (closure := find_closure(args, kwargs)) is None:
            self._clip()
            self._backward_check.begin(stepped_parameters(inner))
            return (inner,), {}
        return (inner, run_after(closure, self._clip)), {}

    def _after_step(self, inner: Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        """Run the hooks after the step."""
        if is_outermost_step(inner):
            self._backward_check.end(inner)
            for hook in self._optimizer_step_post_hooks.values():
                hook(self, (self, *args[1:]), kwargs)

    def _clip(self, closure_loss: Any = None) -> None:
        """Clip before the optimizer inside steps, after its closure if it has one."""
        if self.clipper.process_group is not None:
            refuse_scaler(self)
        if not torch.compiler.is_compiling():
            self.clipper._refuse_if_attached()
            refuse_other_unscaling(self, unwrap(self.optimizer))
            swap = self.clipper._coverage.swap
            if swap is not None and swap.owner is not self._find_innermost():
                self._register_clipper()  # the optimizer inside was replaced
            self.clipper._follow_optimizers(self.optimizer)
        self.clipper._stepper.loss.give_closure_loss(closure_loss)
        self.clipper._stepper.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer and to the clipper, or to neither.

        Args:
          param_group: `{"params": ...}` with the optimizer's settings, which the
            clipper does not read.

        Raises:
          TypeError, ValueError: the optimizer or the clipper refuses the group;
            neither was changed.

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> optimizer.add_param_group({"params": torch.nn.Parameter(torch.zeros(3))})
        >>> len(optimizer.param_groups), optimizer.clipper.names
        (2, ['global'])
        """
        self.optimizer.add_param_group(param_group)
        try:
            for observer in self.clipper._observers:
                if new := observer._parameters.follow_optimizers(self.optimizer):
                    observer.add_param_group(Group(new))
        except Exception:
            self.optimizer.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state dict, with the clipper's under "clipper".

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> sorted(optimizer.state_dict())
        ['clipper', 'param_groups', 'state']
        """
        return {**self.optimizer.state_dict(), "clipper": self.clipper.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both states; without "clipper" in it, the clipper keeps its state.

        Args:
          state_dict: the `state_dict()` of a clipped optimizer, or of an unclipped one.

        Raises:
          ValueError: the state of the optimizer or of the clipper does not fit; neither
            was changed.

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> saved = optimizer.state_dict()
        >>> optimizer.clipper.reset()
        >>> optimizer.load_state_dict(saved)
        >>> optimizer.clipper.metrics()["clip/steps"]
        1.0
        """
        state = dict(state_dict)
        clipper_state = state.pop("clipper", None)
        with self.clipper._undo_on_error():
            if clipper_state is not None:
                self.clipper.load_state_dict(clipper_state)
            self.optimizer.load_state_dict(state)

    def _register_clipper(self) -> None:
        """Expect the clipper in each step of the optimizer inside, or refuse that."""
        innermost = self._find_innermost()
        refuse_beside_trust_clip(self.clipper._stepper, innermost)
        self.clipper._coverage.expect_steps(innermost, is_wrapped=True)

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy copy: the optimizer and the clipper."""
        return {"optimizer": self.optimizer, "clipper": self.clipper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wrap the copied optimizer again."""
        ClippedOptimizer.__init__(self, state["optimizer"], state["clipper"])
