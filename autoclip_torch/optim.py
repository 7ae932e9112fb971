"""A clipper that is an optimizer: it clips, then steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from . import named
from .clipper import Clipper
from .rows.groups import optimizer_groups, params_only
from .step.amp import be_stepped_always, refuse_scaler


class ClippedOptimizer(Optimizer):
    """An optimizer whose `step` clips the gradients first.

    It shares groups and state with the optimizer inside, so that learning-rate
    schedulers, `GradScaler`, hooks, pickle and deepcopy treat it as that optimizer. Its
    state dict is that of the optimizer with the clipper's under "clipper".

    Args:
      optimizer: the optimizer that steps.
      clipper: the clipper of the same parameters.

    Raises:
      TypeError: `optimizer` is no torch optimizer.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = named.NormClip.as_optimizer(
    ...     torch.optim.SGD([weight], lr=1.0), max_norm=1.0)
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> optimizer.step()
    >>> weight.data
    tensor([-0.6000, -0.8000])
    """

    optimizer: Optimizer
    clipper: Clipper

    def __init__(self, optimizer: Optimizer, clipper: Clipper) -> None:
        """Put the clipper in front of the optimizer."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer, got "
                f"{type(optimizer).__name__}; make the optimizer first, then wrap it"
            )
        # The base class makes the hooks; the groups it is shown stay the optimizer's,
        # because the properties below already lead there.
        self.__dict__["optimizer"] = optimizer
        self.__dict__["clipper"] = clipper
        self.__dict__["_ready"] = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._ready = True
        if clipper.process_group is not None:
            be_stepped_always(self)
        # The optimizer inside is what saves and loads: it runs the hooks around that.
        for name in _STATE_HOOKS:
            self.__dict__[name] = getattr(optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        if self._ready:
            self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The state of the optimizer inside."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if self._ready:
            self.optimizer.state = state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Clip and step; with a closure, clip after each time it computed gradients.

        Args:
          closure: computes the loss and its gradients, and returns the loss.

        Returns:
          What the optimizer's step returns: the loss, where there is a closure.

        Raises:
          FloatingPointError, RuntimeError: as `Clipper.step`; and under a `GradScaler`
            where the clipper has a process_group.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = named.NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> weight.data
        tensor([-0.6000, -0.8000])
        """
        if self.clipper.process_group is not None:
            refuse_scaler(self)
        if closure is None:
            self.clipper.step()
            return self.optimizer.step()

        def clipped_closure() -> Any:
            loss = closure()
            self.clipper.step()
            return loss

        return self.optimizer.step(clipped_closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients.

        Args:
          set_to_none: whether they become None, or else 0.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = named.NormClip.as_optimizer(sgd, max_norm=1.0)
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
          TypeError, ValueError: one of the two refuses it; neither was changed.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = named.NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> optimizer.add_param_group({"params": torch.nn.Parameter(torch.zeros(3))})
        >>> len(optimizer.param_groups), optimizer.clipper.names
        (2, ['global'])
        """
        if not self._ready:
            return
        self.optimizer.add_param_group(param_group)
        try:
            self.clipper.add_param_group(params_only(self.optimizer.param_groups[-1]))
        except Exception:
            self.optimizer.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state dict, and the clipper's under "clipper".

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = named.NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> sorted(optimizer.state_dict())
        ['clipper', 'param_groups', 'state']
        """
        return {**self.optimizer.state_dict(), "clipper": self.clipper.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load both; an unclipped optimizer's checkpoint leaves the clipper as it is.

        Args:
          state_dict: what `state_dict()` returned, here or of the optimizer inside.

        Raises:
          ValueError: one of the two does not fit; neither was changed.

        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> optimizer = named.NormClip.as_optimizer(sgd, max_norm=1.0)
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> optimizer.step()
        >>> saved = optimizer.state_dict()
        >>> optimizer.clipper.reset()
        >>> optimizer.load_state_dict(saved)
        >>> optimizer.clipper.metrics()["clip/steps"]
        1.0
        """
        state = dict(state_dict)
        clipper = state.pop("clipper", None)
        # On a device a load writes into the memory of what was there: keep a copy.
        before, decision = self.clipper.state_dict(), self.clipper._learner.decision
        if clipper is not None:
            self.clipper.load_state_dict(clipper)
        try:
            self.optimizer.load_state_dict(state)
        except Exception:
            self.clipper.load_state_dict(before)
            self.clipper._learner.decision = decision
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: both halves."""
        return {"optimizer": self.optimizer, "clipper": self.clipper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put both halves together again."""
        ClippedOptimizer.__init__(self, state["optimizer"], state["clipper"])


_STATE_HOOKS = (
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


class AGC(ClippedOptimizer):
    """Adaptive gradient clipping around an optimizer: `AGC(optimizer, 0.04, 0.003)`.

    T = clipping * max(|w|, eps), with |w| the norm of the unit's weights.

    Args:
      optimizer: any torch optimizer.
      clipping: see `autoclip_torch.AGC`.
      eps: see `autoclip_torch.AGC`.
      model: the module the parameters belong to; with it `exclude` may name parameters,
        and the units of transposed convolutions are right.
      **keywords: see `autoclip_torch.AGC`.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = AGC(torch.optim.SGD([weight], lr=0.1), 0.04, 0.003)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
    >>> weight.grad = torch.tensor([[6.0, 8.0]])
    >>> optimizer.step()
    >>> scheduler.step()
    >>> weight.grad
    tensor([[0.1200, 0.1600]])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        clipping: float = 0.01,
        eps: float = 1e-3,
        *,
        model: torch.nn.Module | None = None,
        **keywords: Any,
    ) -> None:
        """Make the clipper of the optimizer's parameters."""
        groups = optimizer_groups(optimizer, model)
        clipper = named.AGC(groups, clipping=clipping, eps=eps, **keywords)
        super().__init__(optimizer, clipper)
