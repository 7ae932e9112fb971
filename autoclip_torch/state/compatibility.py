"""Whether a saved state fits a clipper: what it says of itself, compared."""

from collections.abc import Iterator, Mapping
from typing import Any

from autoclip_core.clipper.serialize import policy_to_dict
from autoclip_torch.rows.rows import Rows

FORMAT = 1
"""The number of this layout; a later one reads the earlier ones."""


def describe(kind: str, nonfinite: str, rows: Rows) -> dict[str, Any]:
    """Return what a state must agree with to fit a clipper of this kind and rows."""
    named = all(entry.name is not None for entry in rows.by_parameter)
    return {
        "format": FORMAT,
        "class": kind,
        "scope": rows.scope,
        "parameters": [list(entry.parameter.shape) for entry in rows.by_parameter],
        "rows": [[entry.start, entry.stop] for entry in rows.by_parameter],
        "names": [entry.name for entry in rows.by_parameter] if named else None,
        "policies": [policy_to_dict(block.policy) for block in rows.by_policy],
        "settings": {"nonfinite": nonfinite},
    }


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
            raise ValueError(difference(path, theirs, ours))
    # Parameters without names fit those with names, as long as their shapes do.
    named = saved["names"] is not None and own["names"] is not None
    for name in ("settings", "policies", "names") if strict else ():
        if name == "names" and not named:
            continue
        for path, theirs, ours in _differences(saved[name], own[name], name):
            told = difference(path, theirs, ours)
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


def difference(path: str, saved: Any, own: Any) -> str:
    """Return the error that names where a state and a clipper differ."""
    return (
        f"state does not fit this clipper: {path} is {saved!r} there and {own!r} here"
    )
