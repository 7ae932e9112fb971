"""A clipper's state as tensors and plain Python, and whether such a state fits.

`torch.load(weights_only=True)` reads it: no pickled object, no NumPy scalar, no `id()`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from autoclip_core.window import History

FORMAT = 1
"""The number of this layout; a later one reads the earlier ones."""


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
      ValueError: a part is missing, or has another shape or type.
    """
    if isinstance(like, tuple):
        names = like._fields  # type: ignore[attr-defined]
        found = sorted(plain) if isinstance(plain, Mapping) else type(plain).__name__
        if found != sorted(names):
            raise ValueError(_difference(path, found, sorted(names)))
        # A history of all norms grows along its last axis; every other shape is fixed.
        grows = "ordered" if isinstance(like, History) else None
        for name, value in zip(names, like, strict=True):
            if not isinstance(value, tuple):
                _check_array(plain[name], value, f"{path}.{name}", name == grows)
        parts = (
            state_from_plain(plain[name], value, f"{path}.{name}")
            for name, value in zip(names, like, strict=True)
        )
        state = type(like)(*parts)
        if isinstance(state, History):
            _check_history(state, path)
        return state
    if isinstance(like, torch.Tensor):
        return plain.detach().to(like.device, copy=True)
    return plain.detach().cpu().numpy().copy()


def states_from_plain(plain: Any, like: list[Any]) -> list[Any]:
    """Return one state per policy, as `state_from_plain` does."""
    if not isinstance(plain, list) or len(plain) != len(like):
        found = len(plain) if isinstance(plain, list) else type(plain).__name__
        raise ValueError(_difference("the number of states", found, len(like)))
    pairs = enumerate(zip(plain, like, strict=True))
    return [state_from_plain(*pair, f"states[{index}]") for index, pair in pairs]


def check_fit(saved: Mapping[str, Any], own: Mapping[str, Any], strict: bool) -> None:
    """Compare what a state says of its clipper with this clipper.

    Args:
      saved: the state that is to be loaded.
      own: this clipper's own state, for comparison.
      strict: whether plain settings, such as the quantile, must agree too.

    Raises:
      ValueError: they differ; the message names what, and both values.
    """
    missing = sorted(set(own) - set(saved)) if isinstance(saved, Mapping) else None
    if missing is None or missing:
        got = type(saved).__name__ if missing is None else f"no {', '.join(missing)}"
        raise ValueError(
            f"state must be what state_dict() of a clipper returned, got {got}; "
            "was it saved by something else?"
        )
    if any(_differences(saved["format"], FORMAT, "format")):
        raise ValueError(
            f"state must have format {FORMAT}, got {saved['format']!r}; it was saved "
            "by another version of autoclip_torch"
        )
    structure = ["class", "scope", "parameters", "rows"]
    pairs = [(name, saved[name], own[name]) for name in structure]
    pairs += [("policies", _kinds(saved["policies"]), _kinds(own["policies"]))]
    for name, saved_part, own_part in pairs:
        for path, theirs, ours in _differences(saved_part, own_part, name):
            raise ValueError(_difference(path, theirs, ours))
    # Parameters without names fit those with names, as long as their shapes do.
    named = saved["names"] is not None and own["names"] is not None
    for name in ("settings", "policies", "names") if strict else ():
        if name == "names" and not named:
            continue
        for path, theirs, ours in _differences(saved[name], own[name], name):
            told = _difference(path, theirs, ours)
            if _shapes(saved["states"]) == _shapes(own["states"]):
                told += "; pass strict=False to keep this clipper's settings"
            raise ValueError(told)


def _shapes(states: Any) -> Any:
    """Return the names and shapes of what was learned: these no setting can bridge."""
    if isinstance(states, Mapping):
        return {name: _shapes(part) for name, part in states.items()}
    if isinstance(states, list):
        return [_shapes(part) for part in states]
    return tuple(getattr(states, "shape", ()))


def _kinds(policies: Any) -> Any:
    """Return the type of each innermost policy: what a history means."""
    if isinstance(policies, list):
        return [_kinds(policy) for policy in policies]
    while isinstance(policies, Mapping):
        policies = policies.get("policy", policies.get("type"))
    return policies


def _differences(saved: Any, own: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield where two trees of plain Python differ: path, saved value, own value."""
    if isinstance(saved, Mapping) and isinstance(own, Mapping):
        for key in dict.fromkeys([*own, *saved]):
            theirs, ours = saved.get(key, "nothing"), own.get(key, "nothing")
            yield from _differences(theirs, ours, f"{path}.{key}")
    elif isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        for index, (theirs, ours) in enumerate(zip(saved, own, strict=True)):
            yield from _differences(theirs, ours, f"{path}[{index}]")
    elif type(saved) is not type(own) or saved != own:
        yield path, saved, own


def _difference(path: str, saved: Any, own: Any) -> str:
    return (
        f"state does not fit this clipper: {path} is {saved!r} there and {own!r} here"
    )


def _check_history(history: History, path: str) -> None:
    most, room = int(history.count.max(initial=0)), history.ordered.shape[1] - 2
    if most > room:
        raise ValueError(
            f"state is broken: {path} counts {most} norms and holds {room} at most"
        )


def _check_array(plain: Any, like: Any, path: str, grows: bool) -> None:
    if not isinstance(plain, torch.Tensor):
        raise ValueError(_difference(path, type(plain).__name__, "a tensor"))
    theirs, ours = tuple(plain.shape), tuple(like.shape)
    fits = theirs[:-1] == ours[:-1] and len(theirs) > 1 if grows else theirs == ours
    if not fits:
        raise ValueError(_difference(f"the shape of {path}", theirs, ours))
    theirs_type = str(plain.dtype).removeprefix("torch.")
    ours_type = str(like.dtype).removeprefix("torch.")
    if theirs_type != ours_type:
        raise ValueError(_difference(f"the type of {path}", theirs_type, ours_type))
