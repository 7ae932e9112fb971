"""Errors for arguments that a factory cannot use, with the way out."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

from autoclip_core import Policy

P = ParamSpec("P")
Result = TypeVar("Result")

_COMBINATORS = {
    "Warmup": {"warmup_steps": "steps", "warmup_threshold": "threshold"},
    "Floor": {"min_threshold": "min_norm"},
    "Cap": {"max_threshold": "max_norm"},
}
"""Combinators, from the inside out: keywords of torch's clippers, and their fields."""

_SKIP = "wrap the optimizer: skip_steps(optimizer, policy, max_consecutive=...)"
_WAYS_OUT = {
    "dry_run": "apply grads, not updates: _, state = tx.update(grads, state, params)",
    "exclude": "mask the parameters: optax.masked(transformation, mask)",
    "max_consecutive": _SKIP,
    "max_consecutive_skips": _SKIP,
    "nonfinite": "it cancels every update whose norm is not finite",
    "process_group": "inside shard_map give axis_name; under jit leave it out",
}
"""Other keywords of torch's clippers, or of another factory."""


def explain_arguments(
    policy: type[Policy] | None = None, call: str = "clip_by_policy({})"
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Return a decorator that explains unknown keywords and arrays in place of numbers.

    `inspect.signature` still returns the factory's signature, as
    `optax.inject_hyperparams` needs it.

    Args:
      policy: the policy whose arguments the factory takes; None if it takes a policy.
      call: the same transformation, with a place for any policy.
    """

    def decorate(factory: Callable[P, Result]) -> Callable[P, Result]:
        parameters = inspect.signature(factory).parameters
        numbers = [n for n, p in parameters.items() if type(p.default) in (int, float)]

        @wraps(factory)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
            arguments = dict(zip(parameters, args, strict=False)) | kwargs
            _check_numbers(numbers, arguments)
            for name in kwargs.keys() - parameters.keys():
                way_out = _WAYS_OUT.get(name)
                if any(name in fields for fields in _COMBINATORS.values()):
                    code = call.format(_wrapped_policy(policy, arguments))
                    way_out = f"wrap the policy: {code}"
                if way_out:
                    subject = f"{factory.__name__}() has no argument {name!r}"
                    raise TypeError(f"{subject}; {way_out}")
            return factory(*args, **kwargs)

        return checked

    return decorate


def _check_numbers(numbers: Iterable[str], arguments: dict[str, Any]) -> None:
    """Raise `TypeError` if `optax.inject_hyperparams` made an array of a number."""
    for name in numbers:
        if isinstance(arguments.get(name), jax.Array):
            raise TypeError(
                f"{name} must be a number known at tracing, got {arguments[name]!r}; "
                f"under optax.inject_hyperparams name it in static_args: {numbers}"
            )


def _wrapped_policy(policy: type[Policy] | None, arguments: dict[str, Any]) -> str:
    """Return the expression of the policy inside the combinators of the arguments."""
    expression, arguments = "policy", dict(arguments)
    if policy is not None:
        names = [n for n in inspect.signature(policy).parameters if n in arguments]
        settings = ", ".join(f"{name}={arguments.pop(name)!r}" for name in names)
        expression = f"{policy.__name__}({settings})"
    for combinator, fields in _COMBINATORS.items():
        given = [f"{fields[n]}={arguments[n]!r}" for n in fields if n in arguments]
        if given:
            expression = f"{combinator}({', '.join([expression, *given])})"
    return expression
