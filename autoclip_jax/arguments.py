"""Errors for arguments that a factory cannot use, with the way out."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

from autoclip_core import Policy
from autoclip_core.checks import format_error

P = ParamSpec("P")
Result = TypeVar("Result")

_COMBINATORS = {
    "Warmup": {"warmup_steps": "steps", "warmup_threshold": "threshold"},
    "Floor": {"min_threshold": "min_norm"},
    "Cap": {"max_threshold": "max_norm"},
}
"""Combinators, from the inside out: keywords of torch's clippers, and their fields."""

_COMBINATOR_KEYWORDS = [n for fields in _COMBINATORS.values() for n in fields]

_SKIP = "wrap the optimizer: skip_steps(optimizer, policy, max_consecutive=...)"
_WAYS_OUT = {
    "dry_run": "apply the original grads: _, state = tx.update(grads, state, params)",
    "exclude": "mask the parameters: optax.masked(transformation, mask)",
    "max_consecutive": _SKIP,
    "max_consecutive_skips": _SKIP,
    "nonfinite": "it skips every update whose norm is not finite",
    "scale_only": "it scales nothing; give scale_only to a clipper inside of it",
    "process_group": "inside shard_map give axis_name; under jit leave it out",
}
"""Other keywords of torch's clippers, or of another factory."""


def explain_arguments(
    policy: type[Policy] | None = None,
    scope: str | None = None,
    call: str = "clip_by_policy({})",
    ways_out: Mapping[str, str] | None = None,
) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Return a decorator that explains unknown keywords and arrays in place of numbers.

    `inspect.signature` still returns the factory's signature, as
    `optax.inject_hyperparams` needs it.

    Args:
      policy: the policy whose arguments the factory takes; None if it takes a policy.
      scope: the default scope of the factory, if `call` has another default.
      call: the call that makes the same transformation from any policy.
      ways_out: unknown keywords and what to do instead, for this factory.
    """
    known = _WAYS_OUT | dict(ways_out or {})

    def decorate(factory: Callable[P, Result]) -> Callable[P, Result]:
        parameters = inspect.signature(factory).parameters
        numbers = [n for n, p in parameters.items() if type(p.default) in (int, float)]

        @wraps(factory)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Result:
            arguments = dict(zip(parameters, args, strict=False)) | kwargs
            _check_numbers(numbers, arguments)
            for name in kwargs.keys() - parameters.keys():
                way_out = known.get(name)
                if way_out is None and name in _COMBINATOR_KEYWORDS:
                    inside = _suggest_arguments(policy, scope, parameters, arguments)
                    way_out = f"wrap the policy: {call.format(inside)}"
                elif (
                    name == "max_consecutive_skips" and "max_consecutive" in parameters
                ):
                    way_out = "use max_consecutive"
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


def _suggest_arguments(
    policy: type[Policy] | None,
    scope: str | None,
    names: Iterable[str],
    arguments: dict[str, Any],
) -> str:
    """Return the policy as code, wrapped as the arguments need, and the other keywords.

    Args:
      policy: the policy whose arguments the factory takes, or None.
      scope: the default scope of the factory, or None.
      names: the parameters of the factory.
      arguments: the arguments of the call.
    """
    policy_names, expression = ["inner", "policy"], "policy"
    if policy is not None:
        policy_names = [*inspect.signature(policy).parameters]
        settings = _keywords({n: arguments[n] for n in policy_names if n in arguments})
        inside = ", ".join(settings).removeprefix(f"{policy_names[0]}=")
        expression = f"{policy.__name__}({inside})"
    for combinator, fields in _COMBINATORS.items():
        given = [
            f"{fields[name]}={arguments[name]!r}"
            for name in fields
            if name in arguments and name not in policy_names
        ]
        if given:
            expression = f"{combinator}({', '.join([expression, *given])})"
    rest = {n: arguments[n] for n in names if n in arguments and n not in policy_names}
    places = ("scope", "global_clipping", "labels")
    if scope and all(rest.get(name) is None for name in places):
        rest["scope"] = scope
    return ", ".join([expression, *_keywords(rest)])


def _keywords(arguments: dict[str, Any]) -> list[str]:
    """Return the arguments as code; a function is written as a variable."""
    pairs = ((n, n if callable(v) else repr(v)) for n, v in arguments.items())
    return [f"{name}={value}" for name, value in pairs]


def check_transformation(argument: str, value: Any, way_out: str) -> None:
    """Raise `TypeError` if an argument is no gradient transformation."""
    if not hasattr(value, "init") or not hasattr(value, "update"):
        rule = "an optax gradient transformation"
        raise TypeError(format_error(argument, rule, value, way_out))
