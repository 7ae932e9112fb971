"""Check that a saved state fits a clipper, by comparing their descriptions."""

from collections.abc import Callable, Mapping
from typing import Any

from autoclip_core.clipper.serialize import policy_to_dict
from autoclip_torch.rows.rows import Rows

from .differences import check_equal, compare, format_difference
from .saved_rows import arrange_rows

FORMAT = 1
"""The version of the state format. A later version reads the earlier ones."""


def describe_clipper(kind: str, nonfinite: str, rows: Rows) -> dict[str, Any]:
    """Return the description that a state must match to fit such a clipper."""
    has_names = all(entry.name is not None for entry in rows.by_parameter)
    # The norm is left out if it is "l2", as in the states of earlier versions.
    other_norm = {} if rows.norm == "l2" else {"norm": rows.norm}
    return other_norm | {
        "format": FORMAT,
        "class": kind,
        "scope": rows.scope,
        "parameters": [list(entry.parameter.shape) for entry in rows.by_parameter],
        "rows": [[entry.start, entry.stop] for entry in rows.by_parameter],
        "names": [entry.name for entry in rows.by_parameter] if has_names else None,
        "policies": [policy_to_dict(block.policy) for block in rows.by_policy],
        "settings": {"nonfinite": nonfinite},
    }


def fit_state(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    strict: bool,
    make_empty: Callable[[], Mapping[str, Any]],
) -> Mapping[str, Any]:
    """Return a saved state with the rows of a clipper, if it fits.

    Args:
      saved: the state to load.
      current: the present state of the clipper.
      strict: whether the parameters must agree, and plain settings such as the
        quantile. If not, only the rows in common continue.
      make_empty: returns the state of the clipper without history.

    Raises:
      ValueError: the states differ; the message names the part and both values.
    """
    _check_origin(saved, current)
    for name in ("class", "scope"):
        check_equal(saved[name], current[name], name)
    saved = arrange_rows(saved, current, strict, make_empty)
    _check_structure(saved, current)
    if strict:
        _check_settings(saved, current)
    return saved


def _check_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    if "loss" in saved and "loss" not in current:
        error = format_difference("loss_policy", _get_loss_policy(saved["loss"]), None)
        raise ValueError(f"{error}; pass strict=False to load the state without it")
    can_load = _shapes(saved["states"]) == _shapes(current["states"])
    way_out = "; pass strict=False to keep this clipper's settings" if can_load else ""
    for name in ("settings", "policies"):
        check_equal(saved[name], current[name], name, way_out)


def _check_origin(saved: Any, current: Mapping[str, Any]) -> None:
    """Raise a ValueError unless `state_dict()` made the state, in this format."""
    missing = None
    # A state without a loss policy has no "loss", and one of l2 norms has no "norm".
    if isinstance(saved, Mapping):
        missing = sorted(set(current) - {*saved, "loss", "norm"})
    if missing is None or missing:
        got = type(saved).__name__ if missing is None else f"no {', '.join(missing)}"
        raise ValueError(
            f"state_dict must be a result of clipper.state_dict(), got {got}; was it "
            "saved by something else?"
        )
    if any(compare(saved["format"], FORMAT, "format")):
        raise ValueError(
            f"state_dict must have format {FORMAT}, got {saved['format']!r}; it was "
            "saved by another version of autoclip_torch"
        )


def _check_structure(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise a ValueError if the history would have another meaning in the clipper."""
    for name in ("parameters", "rows"):
        check_equal(saved[name], current[name], name)
    check_equal(_types(saved["policies"]), _types(current["policies"]), "policies")
    check_equal(saved.get("norm", "l2"), current.get("norm", "l2"), "norm")


def check_loss_matches(
    saved: Mapping[str, Any], current: Mapping[str, Any], strict: bool
) -> None:
    """Check that the saved loss policy fits; the arguments are as above."""
    policy, present = _get_loss_policy(saved), current["policy"]
    check_equal(_types(policy), _types(present), "loss_policy")
    if strict:
        check_equal(policy, present, "loss_policy")


def _get_loss_policy(saved: Any) -> Any:
    """Return the policy of a saved loss policy, which must be whole."""
    names = ["policy", "state"]
    keys = sorted(saved) if isinstance(saved, Mapping) else type(saved).__name__
    if keys != names:
        raise ValueError(format_difference("loss", keys, names))
    return saved["policy"]


def _shapes(states: Any) -> Any:
    """Return the names and shapes of the policy states: these must always agree."""
    if isinstance(states, Mapping):
        return {name: _shapes(part) for name, part in states.items()}
    if isinstance(states, list):
        return [_shapes(part) for part in states]
    return tuple(getattr(states, "shape", ()))


def _types(policies: Any) -> Any:
    """Return the type of each innermost policy, which gives a history its meaning."""
    if isinstance(policies, list):
        return [_types(policy) for policy in policies]
    if not isinstance(policies, Mapping):
        return policies
    inner = [_types(part) for part in policies.values() if isinstance(part, Mapping)]
    if inner:
        return inner[0] if len(inner) == 1 else inner
    kind = policies.get("type")
    # With `log`, the deviation in the state of `ZScore` is one of logarithms.
    has_logs = kind == "ZScore" and policies.get("log")
    return "ZScore(log=True)" if has_logs else kind
