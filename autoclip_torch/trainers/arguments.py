"""Check the arguments of a clipper when its callback is made, not when training starts.

At that time there is neither a model nor an optimizer.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoclip_torch.gradients.ranks import check_process_group
from autoclip_torch.rows.selection import Selection

from .create_clipper import find_function, takes_optimizer

_OF_THE_MODEL = ("exclude", "scale_only", "replicated", "process_group")
"""The arguments of `Selection`, which name parameters or ranks of the real model."""


def check_arguments(make: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that the clipper will refuse.

    Args:
      make: a class of clippers, also in a `functools.partial`, or a function.
      keywords: its keywords.

    Raises:
      TypeError, ValueError: an argument breaks its rule; the message says which.
    """
    check_process_group(keywords.get("process_group"))
    Selection(*map(keywords.get, _OF_THE_MODEL))
    if not isinstance(find_function(make), type):
        _check_signature(make, keywords)  # it may be called only with the real model
        return
    model = nn.ParameterList([torch.zeros(1)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    groups = list(model.parameters())
    given = (model, optimizer) if takes_optimizer(make) else (groups,)
    make(*given, **{k: v for k, v in keywords.items() if k not in _OF_THE_MODEL})


def _check_signature(make: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Refuse keywords that a function does not take."""
    try:
        inspect.signature(make).bind(None, **keywords)
    except TypeError as error:
        raise TypeError(
            "clipper must be a class of autoclip_torch, or a function that takes "
            f"parameter groups and the keywords, got a function for which {error!s}"
        ) from error
