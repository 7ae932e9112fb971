"""Convert a policy state to tensors and plain Python, and back.

`torch.load(weights_only=True)` reads the result: it has no pickled object, no NumPy
scalar and no `id()`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from autoclip_core.clipper.metrics import Tally
from autoclip_core.history.full import History
from autoclip_core.history.validation import find_problems

from .differences import format_difference
from .trees import move


def state_to_dict(state: Any) -> Any:
    """Return a NamedTuple of arrays as a dict of copies, as tensors."""
    if isinstance(state, tuple):
        pairs = zip(state._fields, state, strict=True)  # type: ignore[attr-defined]
        return {name: state_to_dict(value) for name, value in pairs}
    if isinstance(state, torch.Tensor):  # `weights_only` refuses a subclass
        return state.detach().clone().as_subclass(torch.Tensor)
    return torch.from_numpy(np.array(state))


def state_from_dict(
    saved: Any, like: Any, path: str, *, is_signed: bool = False
) -> Any:
    """Return the saved state with the structure and the device of `like`.

    Args:
      saved: a dict of tensors, as `state_to_dict` returns it.
      like: a state of the present structure.
      path: the name of the state in the messages.
      is_signed: whether its values may be 0 or negative, as losses may.

    Raises:
      ValueError: a part is missing, has another shape or type, or has values that no
        run can produce.
    """
    state = _convert(saved, like, path)
    for fault in find_problems(move(state, None), path, is_signed=is_signed):
        raise ValueError(f"state is invalid: {fault}; load a valid one")
    return state


def states_from_list(saved: Any, like: list[Any]) -> list[Any]:
    """Return one state per policy, as `state_from_dict` does."""
    if not isinstance(saved, list) or len(saved) != len(like):
        count = len(saved) if isinstance(saved, list) else type(saved).__name__
        raise ValueError(format_difference("the number of states", count, len(like)))
    pairs = enumerate(zip(saved, like, strict=True))
    return [state_from_dict(*pair, f"states[{index}]") for index, pair in pairs]


def tally_from_dict(saved: Any, like: Tally) -> Tally:
    """Return the saved counts; `dropped` is 0 if an earlier version did not count it.

    Raises:
      ValueError: as `state_from_dict`.
    """
    if isinstance(saved, Mapping):
        saved = {"dropped": torch.zeros((), dtype=torch.int32), **saved}
    tally: Tally = state_from_dict(saved, like, "tally")
    return tally


def _convert(saved: Any, like: Any, path: str, may_grow: bool = False) -> Any:
    """Return the saved state with the structure and the device of `like`."""
    if isinstance(like, tuple):
        names = like._fields  # type: ignore[attr-defined]
        keys = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
        if keys != sorted(names):
            raise ValueError(format_difference(path, keys, sorted(names)))
        # Only the two older parts of a history grow. Every other shape is fixed.
        growing = ("old", "settled") if isinstance(like, History) else ()
        parts = (
            _convert(saved[name], value, f"{path}.{name}", name in growing)
            for name, value in zip(names, like, strict=True)
        )
        return type(like)(*parts)
    _check_array(saved, like, path, may_grow)
    if isinstance(like, torch.Tensor):
        return saved.detach().to(like.device, copy=True)
    return saved.detach().cpu().numpy().copy()


def _check_array(saved: Any, like: Any, path: str, may_grow: bool) -> None:
    if not isinstance(saved, torch.Tensor):
        raise ValueError(format_difference(path, type(saved).__name__, "a tensor"))
    saved_shape, shape = tuple(saved.shape), tuple(like.shape)
    has_grown = may_grow and len(saved_shape) > 1 and saved_shape[:-1] == shape[:-1]
    if saved_shape != shape and not has_grown:
        raise ValueError(format_difference(f"the shape of {path}", saved_shape, shape))
    types = [str(array.dtype).removeprefix("torch.") for array in (saved, like)]
    if types[0] != types[1]:
        raise ValueError(format_difference(f"the type of {path}", *types))
