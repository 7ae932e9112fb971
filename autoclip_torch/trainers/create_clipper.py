"""Create the clipper of a trainer's optimizers, when these exist."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from autoclip_torch.hooks.attachable import Attachable
from autoclip_torch.hooks.stepped_parameters import read_stepped
from autoclip_torch.observer.base import BaseClipper


def create_clipper(
    make: Callable[..., Any],
    keywords: Mapping[str, Any],
    optimizers: Sequence[Optimizer],
    model: nn.Module,
) -> Any:
    """Return a clipper of optimizers; all but a `Clipper` are registered on them.

    Args:
      make: a class of clippers, also in a `functools.partial`; or a function of
        parameter groups and the keywords that returns a `Clipper`.
      keywords: the keywords of a clipper.
      optimizers: a class that takes an optimizer gets the only one.
      model: the module whose parameters they step.

    Raises:
      TypeError: a function cannot make a `Clipper`.
      ValueError: an argument does not fit the model or the optimizers.
    """
    if takes_optimizer(make):
        return make(model, *optimizers, **keywords)
    if not isinstance(find_function(make), type):
        make = partial(_call, make)
    return make(read_stepped(optimizers, model), **keywords)


def takes_optimizer(make: Any) -> bool:
    """Return whether a clipper is made of a model and an optimizer."""
    kind = find_function(make)
    is_clipper = isinstance(kind, type) and issubclass(kind, BaseClipper)
    return is_clipper and not issubclass(kind, Attachable)


def find_function(make: Any) -> Any:
    """Return the class or function inside partial functions."""
    while isinstance(make, partial):
        make = make.func
    return make


def _call(make: Callable[..., Any], groups: Any, **keywords: Any) -> Any:
    """Call a function that makes a clipper; its `TypeError` gets the way out."""
    try:
        return make(groups, **keywords)
    except TypeError as error:
        raise TypeError(
            "clipper must be a class of autoclip_torch, or a function that makes a "
            f"Clipper of parameter groups, got a function that raised {error!s}; write "
            "ClipCallback(TrustClip, ratio=0.01), and so for UpdateClipper"
        ) from error
