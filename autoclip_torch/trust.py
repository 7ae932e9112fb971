"""`TrustClip` filters the gradient and bounds the update, inside `optimizer.step()`."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from autoclip_core import Decision
from autoclip_core.checks import format_error
from autoclip_core.clipper.patterns import as_patterns
from autoclip_core.clipper.settings import format_clipper
from autoclip_core.clipper.trust import (
    HISTORY_LENGTH,
    QUANTILE,
    RATIO,
    make_bound,
    make_filter,
)

from .clipper import Clipper
from .hooks.clipped_optimizer import ClippedOptimizer
from .hooks.stepped_parameters import read_stepped
from .observer.base import BaseClipper
from .rows.selection import Patterns
from .rows.settings import StepCallback
from .update import UpdateClipper, check_model
from .update_step.optimizers import find_innermost
from .update_step.trust_optimizer import TrustOptimizer, refuse_other_filters


class TrustClip(BaseClipper):
    """Clip the gradient at its recent quantile, and bound the update by the weights.

    There is no number to choose. Two limits act inside `optimizer.step()`:

    - The filter clips the gradient g before the step. Its threshold is the `quantile`
      of the last `history_length` norms |g| of all parameters.
    - The bound clips the update of each parameter w after the step. The root mean
      square of the update is at most T = ratio * max(rms(w), 0.2). So weights that
      start at 0 can grow. Half-precision weights are rounded after that.

    From the second step on, a spike of the gradient is clipped before it enters the
    moments of the optimizer. A learning rate that is too high does not move the weights
    beyond the bound.

    The clipper registers itself on the optimizer, which keeps it alive: nothing else is
    called. Parameters that the optimizer gets later are clipped from then on. A copied
    or unpickled optimizer has no hooks, and a copied clipper is not registered: make a
    new one on the copy and load the state, or use `as_optimizer`.

    Args:
      model: the module whose parameters the optimizer steps. With None, the rows have
        the names that the optimizer knows, if any.
      optimizer: the torch optimizer, or a wrapper around it.
      ratio: bound: the largest update, as a fraction of the weights, > 0.
      quantile: filter: in [0, 1]; 0.9 clips about 10 % of the steps.
      history_length: filter: the number of norms that it keeps, >= 1.
      scope: bound: the updates that share one norm: those of each "parameter" (the
        default), of each output "unit" of each parameter, of each "group" of the
        optimizer, or all ("global").
      exclude: both: parameters to leave out, as in `Clipper`.
      nonfinite: filter: what happens if the norm is NaN or infinite, as in `Clipper`.
        The bound always restores the weights of a row whose update is not finite.
      dry_run: both: measure, decide and record, but change nothing.
      on_clip, on_skip: both: as in `Clipper`. The filter calls them before the weights
        change, with the name "global"; the bound calls `on_clip` after that.

    Raises:
      TypeError, ValueError: an argument breaks its rule, or an `UpdateClipper` bounds
        the update already; the message says which.
      RuntimeError: another clipper clips the gradients of the optimizer already.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(layer.weight, 0.5)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=100.0)
    >>> clipper = TrustClip(layer, optimizer)
    >>> layer.weight.grad = torch.ones(1, 2)
    >>> optimizer.step()
    >>> layer.weight.data
    tensor([[0.4950, 0.4950]])
    """

    def __init__(
        self,
        model: nn.Module | None,
        optimizer: Any,
        *,
        ratio: float = RATIO,
        quantile: float = QUANTILE,
        history_length: int = HISTORY_LENGTH,
        scope: str = "parameter",
        exclude: Patterns = (),
        nonfinite: str = "zero",
        dry_run: bool = False,
        on_clip: StepCallback | None = None,
        on_skip: StepCallback | None = None,
    ) -> None:
        check_model(model, "TrustClip(model, optimizer)")
        refuse_other_filters(optimizer)
        innermost, bound = find_innermost(optimizer), make_bound(ratio)
        both: dict[str, Any] = {"exclude": as_patterns(exclude), "dry_run": dry_run}
        groups = read_stepped([innermost], model)
        policy = make_filter(quantile, history_length)
        self._filter = Clipper(
            groups, policy, scope="global", nonfinite=nonfinite, **both
        )
        self._bound = UpdateClipper(
            model, innermost, bound, scope=scope, norm="rms", **both
        )
        self.on_clip, self.on_skip = on_clip, on_skip
        self._filter._attach(innermost, is_trust_clip=True)

    process_group = None
    """No ranks: sharded parameters (`DTensor`) know their ranks."""

    @property
    def names(self) -> list[str]:
        """The name of each row of the bound; the filter has one row, "global"."""
        return self._bound.names

    def step(self) -> NoReturn:
        """Raise a RuntimeError: it clips inside `optimizer.step()`.

        Raises:
          RuntimeError: always.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> clipper.step()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        RuntimeError: it clips inside optimizer.step(); leave clipper.step() out; ...
        """
        raise RuntimeError(
            "it clips inside optimizer.step(); leave clipper.step() out; to log, call "
            "log.record(clipper.metrics()) after optimizer.step()"
        )

    def observe(self, norms: Any) -> Decision:
        """Record norms of the gradient in the filter, such as those of an earlier run.

        Then the first step has a threshold, too. The metrics count the norms as steps.

        Args:
          norms: the l2 norm of all clipped gradients in one step, a number, or in a
            series of steps, shape (steps,); as in `Clipper.observe`.

        Returns:
          The decision of the filter on the last step.

        Raises:
          ValueError: the shape does not fit, or the series is empty.
          FloatingPointError: as in `Clipper.observe`.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> clipper.observe([1.0, 2.0, 4.0]).threshold
        tensor([1.9000])
        """
        return self._filter.observe(norms)

    @classmethod
    def as_optimizer(
        cls,
        optimizer: torch.optim.Optimizer,
        *,
        model: nn.Module | None = None,
        **keywords: Any,
    ) -> ClippedOptimizer:
        """Return an optimizer that clips inside its step, with one state dict.

        Its state dict is that of the optimizer, with that of the clipper under
        "clipper". Its copies clip, too.

        Args:
          optimizer: any torch optimizer.
          model: the module whose parameters it steps, for their names and layers.
          **keywords: the keywords of the constructor.

        Raises:
          TypeError, ValueError, RuntimeError: as the constructor.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> sgd = torch.optim.SGD(layer.parameters(), lr=100.0)
        >>> optimizer = TrustClip.as_optimizer(sgd)
        >>> sorted(optimizer.state_dict())
        ['clipper', 'param_groups', 'state']
        """
        return TrustOptimizer(optimizer, cls(model, optimizer, **keywords))

    def state_dict(self) -> dict[str, Any]:
        """Return the states of both halves: tensors and plain Python.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> sorted(clipper.state_dict())
        ['class', 'gradient', 'update']
        """
        return {
            "class": type(self).__name__,
            "gradient": self._filter.state_dict(),
            "update": self._bound.state_dict(),
        }

    def load_state_dict(
        self, state_dict: dict[str, Any], *, strict: bool = True
    ) -> None:
        """Continue from a saved state. A resumed run is identical bit for bit.

        Args:
          state_dict: the result of `state_dict()`.
          strict: whether parameters and plain settings (the quantile, the ratio) must
            agree; see `Clipper.load_state_dict`.

        Raises:
          ValueError: the state of a half does not fit; the message names the
            difference, and neither half was changed.

        >>> layer = nn.Linear(2, 1, bias=False)
        >>> clipper = TrustClip(layer, torch.optim.SGD(layer.parameters()))
        >>> clipper.load_state_dict(clipper.state_dict())
        """
        _check_has_halves(state_dict)
        with self._undo_on_error():
            self._filter.load_state_dict(state_dict["gradient"], strict=strict)
            self._bound.load_state_dict(state_dict["update"], strict=strict)

    def __repr__(self) -> str:
        """Return the class, its arguments that are not defaults, and the rows."""
        quantile: Any = self._filter.policy
        bound: Any = self._bound.policy
        arguments = {
            "ratio": bound.clipping,
            "quantile": quantile.quantile,
            "history_length": quantile.history_length,
        }
        settings: dict[str, Any] = {
            "exclude": self._filter._rules.selection.exclude,
            "dry_run": self.dry_run,
            "nonfinite": self._filter.nonfinite,
        }
        shown = {k: value for k, value in settings.items() if value and value != "zero"}
        shown["rows"] = len(self.names)
        return format_clipper(type(self), arguments, self._bound.scope, shown)

    def _register(self, innermost: torch.optim.Optimizer) -> None:
        """Register both halves on a copied optimizer."""
        self._bound._register(innermost)
        self._filter._attach(innermost, is_trust_clip=True)

    @property
    def _observers(self) -> Sequence[Any]:
        return [self._filter, self._bound]


def _check_has_halves(state_dict: Any) -> None:
    """Refuse a state dict that lacks a half of a `TrustClip`.

    Raises:
      ValueError: it is not the state dict of a `TrustClip`.
    """
    is_mapping = isinstance(state_dict, Mapping)
    if not is_mapping or not {"gradient", "update"} <= set(state_dict):
        rule = 'the state_dict() of a TrustClip, with "gradient" and "update"'
        value = sorted(state_dict) if is_mapping else state_dict
        raise ValueError(format_error("state_dict", rule, value, ""))
