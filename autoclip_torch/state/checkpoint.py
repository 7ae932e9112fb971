"""A policy's state as tensors and plain Python, and back.

`torch.load(weights_only=True)` reads it: no pickled object, no NumPy scalar, no `id()`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from autoclip_core.history.full import History
from autoclip_core.history.validation import find_problems

from .compatibility import difference
from .trees import moved


def state_to_plain(state: Any) -> Any:
    """Return a NamedTuple of arrays as a dict of tensors of its own."""
    if isinstance(state, tuple):
        pairs = zip(state._fields, state, strict=True)  # type: ignore[attr-defined]
        return {name: state_to_plain(value) for name, value in pairs}
    if isinstance(state, torch.Tensor):  # a subclass would need more than the weights
        return state.detach().clone().as_subclass(torch.Tensor)
    return torch.from_numpy(np.array(state))


def state_from_plain(plain: Any, like: Any, path: str) -> Any:
    """Return the state that `plain` holds, in the structure and place of `like`.

    Raises:
      ValueError: a part is missing, has another shape or type, or holds what no run
        leaves behind.
    """
    state = _fitted(plain, like, path)
    for fault in find_problems(moved(state, None), path):
        raise ValueError(f"state is broken: {fault}; load one that is whole")
    return state


def states_from_plain(plain: Any, like: list[Any]) -> list[Any]:
    """Return one state per policy, as `state_from_plain` does."""
    if not isinstance(plain, list) or len(plain) != len(like):
        found = len(plain) if isinstance(plain, list) else type(plain).__name__
        raise ValueError(difference("the number of states", found, len(like)))
    pairs = enumerate(zip(plain, like, strict=True))
    return [state_from_plain(*pair, f"states[{index}]") for index, pair in pairs]


def _fitted(plain: Any, like: Any, path: str) -> Any:
    """Return the state in the structure and place of `like`, if it fits there."""
    if isinstance(like, tuple):
        names = like._fields  # type: ignore[attr-defined]
        found = sorted(plain) if isinstance(plain, Mapping) else type(plain).__name__
        if found != sorted(names):
            raise ValueError(difference(path, found, sorted(names)))
        # The older norms of a history grow in number; every other shape is fixed.
        grows = ("old", "settled") if isinstance(like, History) else ()
        for name, value in zip(names, like, strict=True):
            if not isinstance(value, tuple):
                _check_array(plain[name], value, f"{path}.{name}", name in grows)
        parts = (
            _fitted(plain[name], value, f"{path}.{name}")
            for name, value in zip(names, like, strict=True)
        )
        return type(like)(*parts)
    if isinstance(like, torch.Tensor):
        return plain.detach().to(like.device, copy=True)
    return plain.detach().cpu().numpy().copy()


def _check_array(plain: Any, like: Any, path: str, grows: bool) -> None:
    if not isinstance(plain, torch.Tensor):
        raise ValueError(difference(path, type(plain).__name__, "a tensor"))
    theirs, ours = tuple(plain.shape), tuple(like.shape)
    fits = theirs[:-1] == ours[:-1] and len(theirs) > 1 if grows else theirs == ours
    if not fits:
        raise ValueError(difference(f"the shape of {path}", theirs, ours))
    theirs_type = str(plain.dtype).removeprefix("torch.")
    ours_type = str(like.dtype).removeprefix("torch.")
    if theirs_type != ours_type:
        raise ValueError(difference(f"the type of {path}", theirs_type, ours_type))
