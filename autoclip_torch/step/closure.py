"""The closure among the arguments of an optimizer's step."""

from collections.abc import Callable
from typing import Any


def find_closure(args: Any, kwargs: dict[str, Any]) -> Any:
    """Return the closure of a step or None; args[0] is the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def replace_closure(
    args: Any, kwargs: dict[str, Any], closure: Callable[[], Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a step with another closure."""
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


def run_after(closure: Callable[[], Any], act: Callable[[Any], Any]) -> Any:
    """Return a closure that calls a function with the loss of the given one."""

    def longer_closure() -> Any:
        loss = closure()
        act(loss)
        return loss

    return longer_closure
