"""A hook that does not keep its owner alive."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


class WeakHook:
    """Calls a bound method as long as its owner exists, except in compiled steps."""

    def __init__(self, method: Callable[..., Any]) -> None:
        """Take the method."""
        self._method = weakref.WeakMethod(method)

    @property
    def owner(self) -> Any:
        """The object of the method, or None if it was deleted."""
        return getattr(self._method(), "__self__", None)

    def __call__(self, *args: Any) -> Any:
        """Call the method if its owner exists."""
        method = None if torch.compiler.is_compiling() else self._method()
        return None if method is None else method(*args)


def register_weak_hook(
    register: Callable[[Any], Any], method: Callable[..., Any]
) -> Any:
    """Register a bound method as a hook, and remove the hooks without an owner.

    Args:
      register: torch's function that registers it.
      method: it takes what such a hook takes.

    Returns:
      The handle that removes it.
    """
    handle = register(WeakHook(method))
    hooks = handle.hooks_dict_ref()
    for key, hook in [*hooks.items()]:
        if isinstance(hook, WeakHook) and hook.owner is None:
            del hooks[key]
    return handle
