"""Errors for arguments that a factory cannot use, with the way out."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

from autoclip_core.checks import format_error

P = ParamSpec("P")
Result = TypeVar("Result")

_COMBINATORS = {
    "warmup_steps": "Warmup(policy, steps=..., threshold=...)",
    "warmup_threshold": "Warmup(policy, steps=..., threshold=...)",
    "min_threshold": "Floor(policy, min_norm=...)",
    "max_threshold": "Cap(policy, max_norm=...)",
}
"""Keywords of torch's clippers, and what does the same to a policy."""

_SKIP = "wrap the optimizer: skip_steps(optimizer, policy, max_consecutive=...)"
_WAYS_OUT = {
    "dry_run": "apply the original grads: _, state = tx.update(grads, state, params)",
    "exclude": "mask the parameters: optax.masked(transformation, mask)",
    "max_consecutive": _SKIP,
    "max_consecutive_skips": _SKIP,
    "process_group": "inside shard_map give axis_name; under jit leave it out",
}
"""Other keywords of torch's clippers, or of another factory."""


def explain_arguments(
    call: str = "clip_by_policy({})", ways_out: Mapping[str, str] | None = None
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Return a decorator that explains unknown keywords and arrays in place of numbers.

    `inspect.signature` still returns the factory's signature, as
    `optax.inject_hyperparams` needs it.

    Args:
      call: the call that makes the same transformation from any policy.
      ways_out: unknown keywords and what to do instead, for this factory.
    """
    wrap = "wrap the policy: " + call
    wrapped = {name: wrap.format(policy) for name, policy in _COMBINATORS.items()}
    known = _WAYS_OUT | wrapped | dict(ways_out or {})

    def decorate(factory: Callable[P, Result]) -> Callable[P, Result]:
        parameters = inspect.signature(factory).parameters
        numbers = [n for n, p in parameters.items() if type(p.default) in (int, float)]

        @wraps(factory)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
            _check_numbers(numbers, dict(zip(parameters, args, strict=False)) | kwargs)
            for name in kwargs.keys() - parameters.keys():
                if name in known:
                    subject = f"{factory.__name__}() has no argument {name!r}"
                    raise TypeError(f"{subject}; {known[name]}")
            return factory(*args, **kwargs)

        return checked

    return decorate


def _check_numbers(numbers: Iterable[str], arguments: dict[str, Any]) -> None:
    """Raise `TypeError` if `optax.inject_hyperparams` made an array of a number.

    The error lists the arguments that are arrays: optax refuses the name of an argument
    that the caller's function does not have.
    """
    arrays = [n for n in numbers if isinstance(arguments.get(n), jax.Array)]
    if arrays:
        name = arrays[0]
        raise TypeError(
            f"{name} must be a number known at tracing, got {arguments[name]!r}; "
            f"under optax.inject_hyperparams name it in static_args: {arrays}"
        )


def check_transformation(argument: str, value: Any, way_out: str) -> None:
    """Raise `TypeError` if an argument is no gradient transformation."""
    if not hasattr(value, "init") or not hasattr(value, "update"):
        rule = "an optax gradient transformation"
        raise TypeError(format_error(argument, rule, value, way_out))
