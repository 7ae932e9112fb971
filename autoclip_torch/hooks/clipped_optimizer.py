"""An optimizer that clips the gradients, then steps."""

from collections.abc import Callable
from typing import Any

import torch

from autoclip_torch.loop.backward_in_step import BackwardCheck
from autoclip_torch.observer.undo import undo_on_error
from autoclip_torch.rows.groups import Group
from autoclip_torch.step.amp import CONTROLS, refuse_scaler, require_every_step
from autoclip_torch.step.unwrap import unwrap

from .attach import refuse_beside_trust_clip
from .clipped_step import ClippedStep
from .new_parameters import warn_of_left_out
from .step_hooks import STEP_METHODS, make_hooks_run, refuse_step_in_backward

_STATE_HOOKS = (
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def check_is_optimizer(optimizer: Any) -> None:
    """Refuse what cannot be wrapped, such as a wrapper that is no torch optimizer.

    Raises:
      TypeError: the argument is not a torch optimizer.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}"
            "; make the optimizer first, then wrap it; clipper.attach accepts a "
            "wrapper that holds an optimizer"
        )


class ClippedOptimizer(torch.optim.Optimizer):
    """An optimizer whose `step` clips the gradients first.

    It shares its groups and its state with the optimizer inside. Learning-rate
    schedulers, `GradScaler`, hooks, pickle and deepcopy therefore treat it as that
    optimizer. Its state dict is the state dict of the optimizer inside, with the
    clipper's state under "clipper". It has the other public attributes of the optimizer
    inside, such as `train` and `eval`. It clips in the step of the optimizer inside,
    where the hooks of both and torch's global hooks run once. With SAM, it clips before
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

    optimizer: torch.optim.Optimizer
    """The optimizer inside."""
    clipper: Any  # `Clipper`, whose module imports this one
    """The clipper."""
    _backward_check: BackwardCheck

    def __init__(self, optimizer: torch.optim.Optimizer, clipper: Any) -> None:
        """Put the clipper in front of the optimizer."""
        check_is_optimizer(optimizer)
        refuse_step_in_backward(optimizer)
        make_hooks_run(unwrap(optimizer))
        # An optimizer without hooks, such as PostLocalSGDOptimizer, has no defaults.
        defaults = dict(getattr(optimizer, "defaults", {}))
        # The base class creates the hooks here. In `__init__` it would also replace
        # groups and state.
        super().__setstate__({"optimizer": optimizer, "defaults": defaults})
        self.clipper = clipper
        self._backward_check = BackwardCheck()
        self._register_clipper()
        if clipper.process_group is not None:
            require_every_step(self)
        # The optimizer inside saves and loads, so it runs the hooks on its state.
        for name in _STATE_HOOKS:
            self.__dict__[name] = getattr(unwrap(optimizer), name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

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
        return ClippedStep(self).run(closure)

    # torch does not wrap a step that has this mark. Its wrapper would run the hooks of
    # this optimizer, and the global step hooks, which the optimizer inside runs.
    step.hooked = True  # type: ignore[attr-defined]

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Mark the step of a subclass, too: it calls the step of this class."""
        super().__init_subclass__(**keywords)
        cls.step.hooked = True  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        """Return a public attribute of the optimizer inside."""
        if name.startswith("_") or name in CONTROLS or "optimizer" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        value = getattr(self.optimizer, name)
        if name not in STEP_METHODS:
            return value

        def clip_and_step(*args: Any, **keywords: Any) -> Any:
            self._clip()
            return value(*args, **keywords)

        return clip_and_step

    def _clip(self, closure_loss: Any = None) -> None:
        """Clip before the optimizer inside steps, after its closure if it has one."""
        if self.clipper.process_group is not None:
            refuse_scaler(self)
        if not torch.compiler.is_compiling():
            self.clipper._refuse_if_attached()
            swap = self.clipper._coverage.swap
            if swap is not None and swap.owner is not self._find_innermost():
                self._register_clipper()  # the optimizer inside was replaced
            warn_of_left_out(self.clipper._follow_optimizer(self.optimizer))
        self.clipper._stepper.loss.give_closure_loss(closure_loss)
        self.clipper._stepper.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Args:
          set_to_none: whether each gradient becomes None; if not, it becomes 0.

        >>> from autoclip_torch import NormClip
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.zero_grad(set_to_none=False)
        >>> weight.grad
        tensor([0., 0.])
        """
        self.optimizer.zero_grad(set_to_none=set_to_none)

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
            self._extend_clipper()
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
        with undo_on_error(self._list_observers()):
            if clipper_state is not None:
                self.clipper.load_state_dict(clipper_state)
            self.optimizer.load_state_dict(state)

    def _extend_clipper(self) -> None:
        """Add the last group of the optimizer to the clipper."""
        for clipper in self._list_observers():
            if left_out := clipper._follow_optimizer(self.optimizer):
                clipper.add_param_group(Group(left_out))

    def _register_clipper(self) -> None:
        """Expect the clipper in each step of the optimizer inside, or refuse that."""
        innermost = self._find_innermost()
        refuse_beside_trust_clip(self.clipper._stepper, innermost)
        self.clipper._act_in(innermost, is_wrapped=True)

    def _find_innermost(self) -> torch.optim.Optimizer:
        """Return the optimizer whose step runs the hooks."""
        optimizer = self.optimizer
        while isinstance(optimizer, ClippedOptimizer):
            optimizer = optimizer.optimizer
        return unwrap(optimizer)

    def _list_observers(self) -> list[Any]:
        """Return the clippers that have states."""
        return [self.clipper]

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy copy: the optimizer and the clipper."""
        return {"optimizer": self.optimizer, "clipper": self.clipper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Wrap the copied optimizer again."""
        ClippedOptimizer.__init__(self, state["optimizer"], state["clipper"])
