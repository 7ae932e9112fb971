"""A hook that does not keep its owner alive."""

import weakref
from collections.abc import Callable
from typing import Any

import torch


class WeakHook:
    """Calls a method as long as its owner exists, except in compiled steps.

    torch goes through its hooks in a step, and fails if one is removed meanwhile. The
    garbage collector may delete the owner then. So the hook stays until the next one
    is made.

    Args:
      register: torch's function that registers it.
      method: a bound method.
    """

    def __init__(
        self, register: Callable[[Any], Any], method: Callable[..., Any]
    ) -> None:
        """Register it, and remove those without an owner."""
        self._method = weakref.WeakMethod(method)
        self._handle = register(self)
        for hook in [*self._handle.hooks_dict_ref().values()]:
            if isinstance(hook, WeakHook) and hook._method() is None:
                hook._handle.remove()

    @property
    def owner(self) -> Any:
        """The object of the method, or None if it was deleted."""
        return getattr(self._method(), "__self__", None)

    def remove(self) -> None:
        """Call the method no more."""
        self._handle.remove()

    def __call__(self, *args: Any) -> Any:
        """Call the method if its owner exists."""
        method = None if torch.compiler.is_compiling() else self._method()
        return None if method is None else method(*args)
